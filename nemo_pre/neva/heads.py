"""Heads that training adds to the language model and inference drops."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nemo_pre.neva.seeding import seeded

ACTIVATIONS = {"gelu": nn.GELU, "relu": nn.ReLU, "silu": nn.SiLU}


@dataclass(frozen=True)
class PredictionHeadSpec:
    """Shape of PRe's prediction heads, one per target layer (1-based).

    Source: "2-layer MLP" (arXiv 2603.20808); its width is not published. See PReConfig for the defaults.
    """

    layers: tuple[int, ...]
    input_width: int
    hidden_width: int
    output_width: int
    activation: str
    norm: bool
    seed: int

    def build(self, layer: int) -> PredictionHead:
        with seeded(self.seed, f"pre_heads.{layer}"):
            return PredictionHead(self)


class PredictionHead(nn.Module):
    """``fc2(activation(fc1(norm(x))))`` on ``[n, input_width]``, replicated over tensor-parallel ranks."""

    def __init__(self, spec: PredictionHeadSpec) -> None:
        super().__init__()
        if spec.activation not in ACTIVATIONS:
            raise ValueError(
                f"objective.pre.head_activation is '{spec.activation}': choose one of {', '.join(ACTIVATIONS)}."
            )
        self.norm = nn.LayerNorm(spec.input_width) if spec.norm else None
        self.fc1 = nn.Linear(spec.input_width, spec.hidden_width)
        self.activation = ACTIVATIONS[spec.activation]()
        self.fc2 = nn.Linear(spec.hidden_width, spec.output_width)

    def forward(self, visual_tokens: Tensor) -> Tensor:
        hidden = visual_tokens.to(self.fc1.weight.dtype)
        if self.norm is not None:
            hidden = self.norm(hidden)
        return self.fc2(self.activation(self.fc1(hidden)))


def sum_gradients_over_tensor_parallel(module: nn.Module) -> None:
    """Mark a replicated module whose tokens are scattered by sequence parallelism: each rank holds a part of its
    gradient, and Megatron sums the gradients of parameters that carry this mark."""
    parameter: torch.nn.Parameter
    for parameter in module.parameters():
        parameter.sequence_parallel = True  # type: ignore[attr-defined]


@dataclass(frozen=True)
class ReconstructionHeadSpec:
    """Shape of LaVer's visual head V_psi: ``width -> hidden -> hidden -> width``.

    Source: "3-layer MLP" (arXiv 2512.06281); hidden width 2048, GELU, last layer without bias and Kaiming-normal
    weights are the released code's.
    """

    width: int
    hidden_width: int
    seed: int

    def build(self) -> ReconstructionHead:
        with seeded(self.seed, "laver_head"):
            return ReconstructionHead(self)


class ReconstructionHead(nn.Module):
    """``fc3(gelu(fc2(gelu(fc1(x)))))`` on ``[n, width]``, replicated over tensor-parallel ranks."""

    def __init__(self, spec: ReconstructionHeadSpec) -> None:
        super().__init__()
        self.fc1 = nn.Linear(spec.width, spec.hidden_width)
        self.fc2 = nn.Linear(spec.hidden_width, spec.hidden_width)
        self.fc3 = nn.Linear(spec.hidden_width, spec.width, bias=False)
        for layer in (self.fc1, self.fc2, self.fc3):
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)

    def forward(self, visual_tokens: Tensor) -> Tensor:
        hidden = visual_tokens.to(self.fc1.weight.dtype)
        return self.fc3(F.gelu(self.fc2(F.gelu(self.fc1(hidden)))))
