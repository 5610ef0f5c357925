"""A chunk of somebody else's model, as terms see it."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

from nemo_pre.terms.training import VisualChunk


class ForeignChunk(VisualChunk):
    """A chunk of somebody else's model, which knows nothing of micro-batches' plans.

    Attributes:
        kind: the model's name, in sentences.
    """

    kind: str

    @abstractmethod
    def start_step(self, batches: Sequence[dict[str, Any]]) -> None:
        """Take note of a step's planned micro-batches, which the chunk's next forward passes run in this order."""

    @abstractmethod
    def release(self) -> None:
        """Stop listening to the model."""
