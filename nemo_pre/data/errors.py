"""What can be wrong with one sample, as opposed to with the whole dataset or the configuration."""

from __future__ import annotations


class SampleError(ValueError):
    """This sample cannot be read or made sense of; ``data.on_error=skip`` passes over it."""
