"""Evaluating exported models with lmms-eval, in a process of its own, and comparing with the published numbers."""
