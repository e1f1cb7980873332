"""Data loaders of the engine and of other packages, for bench/data.py."""
