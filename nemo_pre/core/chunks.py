"""Model chunks as terms see them, and what each kind of model can carry."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from megatron.core.models.multimodal.llava_model import LLaVAModel
from torch import nn

from nemo_pre.core.foreign import ForeignChunk
from nemo_pre.core.llava import LLaVAChunk
from nemo_pre.neva.model import MCoreVisualNevaModel
from nemo_pre.objectives.objective import Objective
from nemo_pre.terms.training import VisualChunk


def chunk_of(module: nn.Module | ForeignChunk, **facts: Any) -> VisualChunk:
    """A model chunk as terms see it.

    Raises:
        ValueError: it is wrapped, or no model that objectives know.
    """
    if isinstance(module, MCoreVisualNevaModel):
        if facts:
            raise ValueError(f"{', '.join(sorted(facts))}: a chunk of nemo_pre knows this itself, so leave it out.")
        return module
    if isinstance(module, ForeignChunk):
        return module
    if isinstance(module, LLaVAModel):
        return LLaVAChunk(module, **facts)
    if hasattr(module, "module"):
        raise ValueError(
            f"A {type(module).__name__} wraps the model: attach objectives to the chunks before they are wrapped, or "
            f"their heads get no gradients."
        )
    raise ValueError(
        f"Objectives know nemo_pre's own chunks and Megatron-Core's LLaVAModel, not a {type(module).__name__}: build "
        f"one of these around the language model."
    )


def refuse_what_it_cannot_carry(chunk: VisualChunk, enabled: Sequence[tuple[type[Objective], Any]]) -> None:
    """Refuse an objective that needs a model which somebody else's cannot be.

    Raises:
        ValueError: one sentence that names both.
    """
    if not isinstance(chunk, ForeignChunk):
        return
    for objective, _ in enabled:
        if objective.model_words:
            raise ValueError(
                f"{objective.title} needs a model with {' and '.join(objective.model_words)}, which {chunk.kind} "
                f"cannot be: set objective.{objective.name}.enabled=false, or build the model with "
                f"nemo_pre.core.build_chunks."
            )
