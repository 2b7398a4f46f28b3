"""Text → Arrow shards of token ids → batches. Start reading at `prepare.py`."""
