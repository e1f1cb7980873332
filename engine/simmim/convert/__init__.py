"""Checkpoint layouts, one file each: how to know it, and what its shapes tell."""
