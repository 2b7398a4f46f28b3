"""What the training loop calls.

Settings, optimizer, checkpoints, guards. Knows no corpus and no model class.
"""
