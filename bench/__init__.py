"""Benchmarks: the files of this folder are the commands, the folders hold what these need."""
