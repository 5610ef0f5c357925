"""The Hydra config groups of a run, and a thin entry: ``python -m recipes experiment=NAME`` trains."""
