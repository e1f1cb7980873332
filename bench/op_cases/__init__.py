"""Single ops beside the form that they replace, for bench/ops.py and bench/gpu.py."""
