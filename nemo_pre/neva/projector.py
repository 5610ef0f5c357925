"""The projector between encoder and decoder."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from megatron.core.models.vision.multimodal_projector import MultimodalProjector
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import nn

from nemo_pre.parallel.seeding import seeded


@dataclass
class ProjectorConfig(TransformerConfig):
    """A projector's configuration, with initial weights that do not depend on the layout.

    Attributes:
        projector_type: ``mlp2x_gelu`` are two linear layers and a GELU, whole on every rank, another number as many
            layers; ``mcore_mlp`` and ``mcore_affine`` are Megatron's, cut over tensor-parallel ranks.
        input_size, ffn_hidden_size, hidden_size: inputs, inner width and outputs.
        seed: of the initial weights.
        fused: Megatron's kinds are made of Transformer Engine's linear layers.
    """

    num_layers: int = 1  # not used, and Megatron wants it
    num_attention_heads: int = 8  # likewise
    projector_type: str = "mlp2x_gelu"
    input_size: int = 1024
    hidden_size: int = 1024
    ffn_hidden_size: int = 1024
    activation_func: Callable[..., Any] = nn.functional.gelu
    seed: int = 0
    fused: bool = False

    def configure_model(self) -> nn.Module:
        """The projector.

        Raises:
            ValueError: its type is unknown.
        """
        with seeded(self.seed, "vision_projection"):
            if self.projector_type in ("mcore_mlp", "mcore_affine"):
                kind = self.projector_type.removeprefix("mcore_")
                return MultimodalProjector(self, self._layers(kind), projector_type=kind, input_size=self.input_size)
            projector = nn.Sequential(*self._linear_layers())
        projector.set_input_tensor = _receive_nothing  # type: ignore[assignment]
        return projector

    def _layers(self, kind: str) -> MLPSubmodules:
        if kind == "affine":
            return MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=None)
        if not self.fused:
            return MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)
        from megatron.core.extensions.transformer_engine import TEColumnParallelLinear, TERowParallelLinear

        return MLPSubmodules(linear_fc1=TEColumnParallelLinear, linear_fc2=TERowParallelLinear)

    def _linear_layers(self) -> list[nn.Module]:
        depth = re.fullmatch(r"mlp([1-9]\d*)x_gelu", self.projector_type)
        if depth is None:
            raise ValueError(
                f"model.projector={self.projector_type} is unknown: choose mlp<depth>x_gelu, mcore_mlp or "
                f"mcore_affine."
            )
        dtype = self.params_dtype
        layers: list[nn.Module] = [nn.Linear(self.input_size, self.ffn_hidden_size, dtype=dtype)]
        for _ in range(1, int(depth[1])):
            layers += [nn.GELU(), nn.Linear(self.ffn_hidden_size, self.hidden_size, dtype=dtype)]
        return layers


def _receive_nothing(_: object) -> None:
    """Pipeline schedules offer every stage an input; the projector is on the first stage and has none."""
