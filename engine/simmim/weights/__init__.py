"""Weights of every layout: read into our models, written, and proved against the libraries."""
