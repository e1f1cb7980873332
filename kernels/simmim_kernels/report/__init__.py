"""What the Triton kernels compile to, without a GPU; the ops never import this package."""
