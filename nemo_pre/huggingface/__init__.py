"""Hugging Face directories in and out: configuration, names and values of weights, and the files beside them."""
