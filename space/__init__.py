"""What stands behind `app.py`, and all that a Space of the Hub needs. May import everything but scripts."""
