"""The models of other packages that bench/throughput.py compares with."""
