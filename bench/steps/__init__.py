"""One optimisation step of the engine and of other packages, for bench/throughput.py."""
