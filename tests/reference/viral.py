"""VIRAL's term (arXiv 2509.07979) in plain torch: what the oracles of a step add up, sample by sample.

Slow and obvious on purpose: every cosine by itself. ``x_i`` is the head's output at visual token i of decoder layer l,
or in the form ``similarity`` with ``compared=hidden`` the layer's output itself; ``t_i`` the target's feature there,
which gets no gradient.

    direct:     L = mean over layers of  -(1/N_vis) sum_i cos(x_i, t_i)
    similarity: L = mean over layers of  (1/N_entries) sum_images sum_ij (cos(x_i, x_j) - cos(t_i, t_j))^2

``N_vis`` counts the visual tokens of the global batch that entered the language model, ``N_entries`` the pairs of such
tokens within an image, each with itself and in both orders; all tiles of an image are one image.

The paper takes the mean per device over samples with one whole image; the global counts, several images and tiles are
this project's definition. Where there is one image a sample and every device has as many, the two agree.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class ViralReference:
    layers: tuple[int, ...] = ()  # 1-based; empty: no VIRAL
    weight: float = 0.5
    form: str = "direct"  # direct | similarity
    compared: str = "head"  # head | hidden (similarity only)
    target: str = "external"  # external (features in the batch) | encoder (what enters the projector)
    shared_head: bool = True
    head_depth: int = 3  # linear layers, with SiLU between them

    @property
    def has_head(self) -> bool:
        return self.form == "direct" or self.compared == "head"


def head_prefix(layer: int, viral: ViralReference) -> str:
    """What the names of a layer's head begin with."""
    return "viral_head." if viral.shared_head else f"viral_heads.{layer}."


def alignment_head(x_nd: Tensor, layer: int, state: dict[str, Tensor], viral: ViralReference) -> Tensor:
    """Linear, SiLU, linear, SiLU, linear."""
    at = head_prefix(layer, viral)
    for number in range(1, viral.head_depth + 1):
        x_nd = F.linear(x_nd, state[f"{at}fc{number}.weight"], state[f"{at}fc{number}.bias"])
        if number < viral.head_depth:
            x_nd = F.silu(x_nd)
    return x_nd


def cosine(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum() / (a.norm() * b.norm())


def viral_sums(
    images: Sequence[Sequence[tuple[int, int]]],
    hidden: Sequence[Tensor],
    targets_nt: Tensor,
    state: dict[str, Tensor],
    viral: ViralReference,
) -> tuple[dict[int, Tensor], int]:
    """One sample's sum for every target layer, and how many numbers it is of.

    Args:
        images: of each image the (position in the sequence, visual token of the sample) of its tokens that entered.
        hidden: entry l is the output ``[s, d]`` of decoder layer l.
        targets_nt: ``[n, t]``, the target's features of all visual tokens of the sample.
    """
    sums = {layer: hidden[0].new_zeros(()) for layer in viral.layers}
    count = 0
    for tokens in images:
        count += len(tokens) if viral.form == "direct" else len(tokens) ** 2
        for layer in viral.layers:
            compared = {}
            for position, number in tokens:
                x = hidden[layer][position]
                compared[number] = alignment_head(x, layer, state, viral) if viral.has_head else x
            for _, i in tokens:
                if viral.form == "direct":
                    sums[layer] = sums[layer] - cosine(compared[i], targets_nt[i].detach())
                    continue
                for _, j in tokens:
                    wanted = cosine(targets_nt[i].detach(), targets_nt[j].detach())
                    sums[layer] = sums[layer] + (cosine(compared[i], compared[j]) - wanted) ** 2
    return sums, count
