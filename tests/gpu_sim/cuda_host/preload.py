"""Imported first by whatever runs over the stand-in without a conftest of its own."""

from gpu_sim.cuda_host import convolutions

installed = convolutions.install()
