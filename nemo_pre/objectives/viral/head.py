"""VIRAL's alignment head: what the model gets of it before it is built."""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from nemo_pre.parallel.replicated import sum_gradients_over_tensor_parallel
from nemo_pre.parallel.seeding import seeded
from nemo_pre.terms.float32 import Float32Linear
from nemo_pre.terms.training import VisualChunk

ONE, ONE_A_LAYER = "viral_head", "viral_heads"


@dataclass(frozen=True)
class AlignmentHeadSpec:
    """Shape of VIRAL's head: ``widths[0] -> widths[1] -> ...``, SiLU between, for all target layers or one for each.

    Source: the released code (adc0791): linear d -> 2048, SiLU, linear 2048 -> 2048, SiLU, linear 2048 -> the target's
    width; one head for all target layers, a list of heads is an option.
    """

    layers: tuple[int, ...]
    widths: tuple[int, ...]
    shared: bool
    seed: int

    def build(self, name: str) -> AlignmentHead:
        """The head called ``name``, with weights that depend on the seed and the name alone."""
        with seeded(self.seed, name):
            return AlignmentHead(self.widths)

    def parts(self) -> dict[str, nn.Module | Tensor]:
        names = [ONE] if self.shared else [f"{ONE_A_LAYER}.{layer}" for layer in self.layers]
        return {name: self.build(name) for name in names}

    def add_to(self, chunk: VisualChunk) -> None:
        here = [layer for layer in self.layers if chunk.decoder_layer(layer) is not None]
        if not here:
            return
        heads: nn.Module
        if self.shared:
            heads = self.build(ONE)
        else:
            heads = nn.ModuleDict({str(layer): self.build(f"{ONE_A_LAYER}.{layer}") for layer in here})
        setattr(chunk, ONE if self.shared else ONE_A_LAYER, heads)
        if chunk.config.sequence_parallel:
            sum_gradients_over_tensor_parallel(heads)

    def heads_of(self, chunk: VisualChunk) -> dict[int, nn.Module]:
        """A chunk's heads by target layer, once it is built."""
        if not self.shared:
            return {int(layer): head for layer, head in getattr(chunk, ONE_A_LAYER, {}).items()}
        head = getattr(chunk, ONE, None)
        return {} if head is None else dict.fromkeys(self.layers, head)


class AlignmentHead(nn.Module):
    """``fcN(silu(... silu(fc1(x))))`` on ``[n, widths[0]]``, in float32; replicated over tensor-parallel ranks."""

    def __init__(self, widths: tuple[int, ...]) -> None:
        super().__init__()
        self.depth = len(widths) - 1
        for number, (inputs, outputs) in enumerate(zip(widths, widths[1:], strict=False), start=1):
            self.add_module(f"fc{number}", Float32Linear(inputs, outputs))

    def forward(self, visual_tokens: Tensor) -> Tensor:
        hidden = visual_tokens
        for number in range(1, self.depth + 1):
            hidden = self.get_submodule(f"fc{number}")(hidden)
            if number < self.depth:
                hidden = F.silu(hidden)
        return hidden
