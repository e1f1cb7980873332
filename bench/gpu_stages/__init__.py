"""The stages of bench/gpu.py, one file each: a function `run(emit, seconds)` in its own process."""
