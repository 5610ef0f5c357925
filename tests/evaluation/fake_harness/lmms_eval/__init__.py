"""As much of lmms-eval as its callers touch, for machines without it. Its scores are 0.5 everywhere."""
