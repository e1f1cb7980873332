"""Decoding and cropping by NVIDIA DALI."""
