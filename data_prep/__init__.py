"""Offline data preparation: each dataset is turned once into indexed tar shards, before any training."""
