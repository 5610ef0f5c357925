"""Predictive Regularization for NVIDIA NeMo's NeVA, under every parallel layout. Importing this imports nothing."""

__version__ = "0.1.0"
