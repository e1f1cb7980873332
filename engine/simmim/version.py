"""The version of simmim."""

__version__ = "0.1.0"
