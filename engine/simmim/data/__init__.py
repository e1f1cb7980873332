"""From files to uint8 batches: the same samples at any number of workers and ranks."""
