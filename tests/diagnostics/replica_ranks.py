"""The rank's side: a model whose visual tokens are made up, shared out over ranks."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from PIL import Image

from nemo_pre.diagnostics.layers import measure
from nemo_pre.diagnostics.probe import ProbeTask
from nemo_pre.diagnostics.replicas import Replicas
from nemo_pre.diagnostics.samples import DiagnosticSample
from nemo_pre.diagnostics.states import Grid, VisualStates
from tests.diagnostics.diagnose_ranks import numbers

PICTURES, TOKENS, WIDTH, LAYERS = 40, 6, 5, 3
DATA = torch.randn(LAYERS + 1, PICTURES, TOKENS, WIDTH, generator=torch.Generator().manual_seed(0)) + 3


@dataclass(frozen=True)
class MadeUp:
    """Pictures by number: those to fit on behind those to test."""

    fit: list[int]
    test: list[int]
    tasks: Any = (ProbeTask("count", 2),)
    objects: Any = None

    def fit_samples(self) -> Iterator[DiagnosticSample]:
        return map(_sample, self.fit)

    def test_samples(self) -> Iterator[DiagnosticSample]:
        return map(_sample, self.test)


def _sample(number: int) -> DiagnosticSample:
    truth = torch.tensor([1.0, 0.0] if number % 3 else [0.0, 1.0])
    return DiagnosticSample(str(number), Image.new("L", (1, 1)), "", None, truth)


class Recorded:
    num_layers, vocabulary = LAYERS, 4

    def __init__(self, replicas: Replicas) -> None:
        self.replicas = replicas

    def states(self, samples: list[DiagnosticSample], everything: bool) -> VisualStates:
        rows = [int(sample.key) for sample in samples]
        tokens = DATA[:, rows].flatten(1, 2)
        classes = torch.arange(TOKENS).remainder(3).repeat(len(rows))
        found = VisualStates(
            torch.arange(len(rows)).repeat_interleave(TOKENS), [Grid(0, 2, 3)] * len(rows), classes, tokens[0]
        )
        found.layers = dict(enumerate(tokens))
        if everything:
            found.attention = {layer: DATA[layer, rows, :2, 0].sigmoid() for layer in range(1, LAYERS + 1)}
            found.words = tokens[-1][:, :4].argmax(1)
        return found

    def shown(self, sample: DiagnosticSample) -> Image.Image:
        return sample.picture

    def word(self, token: int) -> str:
        return f"word {token}"

    def describe(self) -> dict[str, Any]:
        return {}


def measured_alone(pictures: int, fit: int) -> dict[str, float]:
    return _measured(Replicas(), pictures, fit)


def measured_together(pictures: int, fit: int) -> dict[str, float]:
    """On a rank: the results of all ranks."""
    dist.init_process_group("gloo")
    group = dist.group.WORLD
    found = _measured(Replicas(dist.get_rank(), dist.get_world_size(), group, group), pictures, fit)
    parts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(parts, found)
    return {name: value for part in parts for name, value in part.items()}


def _measured(replicas: Replicas, pictures: int, fit: int) -> dict[str, float]:
    data: Any = MadeUp(list(range(20, 20 + fit)), list(range(pictures)))
    return numbers(measure(Recorded(replicas), data, batch_size=2))
