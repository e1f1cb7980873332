"""A training run: its loop, its step, what it saves and logs; the same for every method."""
