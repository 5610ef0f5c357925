"""All measures of all layers, from the states of one picture after another."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, field
from functools import reduce
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from nemo_pre.diagnostics.moments import (
    Moments,
    effective_dimension,
    length,
    linear_cka,
    merged,
    redundancy,
    relative_distance,
)
from nemo_pre.diagnostics.objects import Names, ObjectMeasures, ObjectsOfBatch
from nemo_pre.diagnostics.patches import PatchSimilarity
from nemo_pre.diagnostics.probe import LinearProbe, ProbeFit, ProbeScore
from nemo_pre.diagnostics.replicas import Replicas
from nemo_pre.diagnostics.samples import DiagnosticData, DiagnosticSample
from nemo_pre.diagnostics.states import Model, VisualStates

TOP_WORDS = 12


@dataclass
class LayerMeasures:
    """The sums of one layer: moments of its visual tokens and with layer 0's, similarities, probe, attention."""

    score: ProbeScore | None = None
    similarity: PatchSimilarity = field(default_factory=PatchSimilarity)
    own: Moments | None = None
    cross: Moments | None = None
    attention: Tensor | None = None  # [heads] summed over pictures, on the CPU
    asked: int = 0

    def update(self, layer: int, states: VisualStates, truth: Tensor) -> None:
        """Add pictures; ``truth`` ``[pictures, C]``, the probes' indicators."""
        tokens = states.layers[layer]
        self.similarity.update(tokens, states.image.to(tokens.device), states.classes)
        self.own = merged(self.own, Moments.of(tokens))
        self.cross = merged(self.cross, Moments.of(tokens, states.entering))
        if self.score is not None:
            self.score.update(states.pooled(layer), truth)
        if layer in states.attention:
            of_pictures = states.attention[layer].double().cpu()
            asked = ~of_pictures.isnan().any(1)
            total = of_pictures[asked].sum(0)
            self.attention = total if self.attention is None else self.attention + total
            self.asked += int(asked.sum())

    def over(self, replicas: Replicas) -> LayerMeasures:
        """The measures over the pictures of all replicas, which every replica gets."""
        assert self.own is not None and self.cross is not None
        tallies = replicas.gathered((self.similarity, self.attention, self.asked, self.score and self.score.tally))
        similarities, attentions, asked, scores = zip(*tallies, strict=True)
        known = [attention for attention in attentions if attention is not None]
        return LayerMeasures(
            self.score and self.score.with_tallies(scores),
            reduce(PatchSimilarity.merge, similarities),
            replicas.summed(self.own),
            replicas.summed(self.cross),
            torch.stack(known).sum(0) if known else None,
            sum(asked),
        )

    def result(self, entering: Moments) -> dict[str, Any]:
        """``entering``: the moments of layer 0."""
        assert self.own is not None and self.cross is not None
        heads = (self.attention / self.asked).tolist() if self.attention is not None and self.asked else None
        return {
            **self.similarity.result(),
            "images_with_contrast": self.similarity.images_with_contrast,
            "visual_tokens": self.own.count,
            "width": len(self.own.mean),
            "effective_dimension": effective_dimension(self.own),
            "redundancy": redundancy(self.own),
            "cka_to_layer_0": linear_cka(self.own, entering, self.cross),
            "length": length(self.own),
            "distance_to_layer_0": relative_distance(self.own, entering, self.cross),
            "attention_to_visual": sum(heads) / len(heads) if heads else None,
            "attention_to_visual_by_head": heads,
            "probe": self.score.result() if self.score is not None else {},
        }


def measure(
    model: Model,
    data: DiagnosticData,
    batch_size: int,
    keep: Any = None,
    progress: Any = None,
    everything: bool = True,
    only: Collection[int] | None = None,
) -> dict[str, Any]:
    """The results of this process's share of the layers it has, and of the logit lens if it has the last.

    Replicas of the model each run their share of the pictures; sums are added up over them, exactly but for rounding.

    Args:
        keep: called with (samples, states) of each test batch, for pictures.
        progress: called with the number of pictures done.
        everything: attention and the logit lens too.
        only: the layers to measure; None: all.
    """
    assert data.objects is None or model.replicas.size == 1, "objects are measured on one rank"
    replicas, share, numbers = model.replicas.sharing(data)
    probes: dict[int, LinearProbe] = {}
    of_objects: dict[int, LinearProbe] = {}
    if data.tasks or data.objects:
        probes, of_objects = _probes(model, replicas, share, numbers, batch_size, progress, only)
    object_measures = {layer: ObjectMeasures(ProbeScore(probe)) for layer, probe in of_objects.items()}
    names = Names(model)
    layers: dict[int, LayerMeasures] = {}
    entering: Moments | None = None
    words = torch.zeros(model.vocabulary, dtype=torch.int64)
    has_words = False
    for _, samples in _batches(share.test_samples(), batch_size):
        states = model.states(samples, everything)
        entering = merged(entering, Moments.of(states.entering))
        objects = ObjectsOfBatch.of(samples, states) if object_measures else None
        for layer in _wanted(states, only):
            if layer not in layers:
                layers[layer] = LayerMeasures(ProbeScore(probes[layer]) if layer in probes else None)
            layers[layer].update(layer, states, _truth(samples))
            if objects is not None and objects.names:
                tokens = states.layers[layer]
                object_measures[layer].update(tokens, objects, names, model.scores(objects.shown_most(tokens)))
        if states.words is not None:
            has_words = True
            words += torch.bincount(states.words.cpu(), minlength=model.vocabulary)
        if keep is not None:
            keep(samples, states)
        _report(progress, len(samples))
    assert entering is not None
    whole_entering = replicas.summed(entering)
    whole = {layer: layers[layer].over(replicas) for layer in sorted(layers)}
    all_words = sum(replicas.gathered(words)) if has_words else None
    results = {layer: whole[layer].result(whole_entering) for layer in replicas.mine(list(whole))}
    for layer, measures in object_measures.items():
        results[layer]["objects"] = measures.result()
    return {
        "layers": results,
        "logit_lens": None if all_words is None else logit_lens(all_words, model),
    }


def _probes(
    model: Model,
    replicas: Replicas,
    share: DiagnosticData,
    numbers: list[int],
    batch_size: int,
    progress: Any,
    only: Collection[int] | None,
) -> tuple[dict[int, LinearProbe], dict[int, LinearProbe]]:
    """The probes of the layers that this process has, of pictures and of the objects in them; replicas solve a share
    of the former each."""
    fits: dict[int, ProbeFit] = {}
    rows: dict[int, list[Tensor]] = {}
    truths: list[Tensor] = []
    folds: list[Tensor] = []
    device = torch.device("cpu")
    for start, samples in _batches(share.fit_samples(), batch_size):
        states = model.states(samples, everything=False)
        number = torch.tensor(numbers[start : start + len(samples)])
        device = states.entering.device
        objects = None
        if share.objects is not None:
            objects = ObjectsOfBatch.of(samples, states)
            truths.append(objects.truth)
            folds.append(number[objects.picture])
        for layer in _wanted(states, only):
            if share.tasks:
                fit = fits.setdefault(layer, ProbeFit(share.tasks))
                fit.update(states.pooled(layer), _truth(samples), number)
            if objects is not None:
                rows.setdefault(layer, []).append(objects.means(states.layers[layer]).float().cpu())
        _report(progress, len(samples))
    whole = {layer: fits[layer].over(replicas) for layer in sorted(fits)}
    solved = {layer: whole[layer].solve().to("cpu") for layer in replicas.mine(list(whole))}
    everyone = replicas.all_gathered(solved)
    of_objects: dict[int, LinearProbe] = {}
    for layer, parts in rows.items():
        assert share.objects is not None
        fit = ProbeFit(share.objects.tasks)
        fit.update(torch.cat(parts), torch.cat(truths), torch.cat(folds))
        of_objects[layer] = fit.solve().to(device)
    return {layer: probe.to(device) for part in everyone for layer, probe in part.items()}, of_objects


def logit_lens(counts: Tensor, model: Model) -> list[dict[str, Any]]:
    """What the last layer would say at the visual tokens: the most frequent most likely tokens and their share.

    Source: PRe (arXiv 2603.20808), after nostalgebraist's logit lens (2020).
    """
    total = max(int(counts.sum()), 1)
    share, token = counts.topk(min(TOP_WORDS, len(counts)))
    pairs = zip(token.tolist(), share.tolist(), strict=True)
    return [{"token": token, "text": model.word(token), "share": n / total} for token, n in pairs if n]


def _wanted(states: VisualStates, only: Collection[int] | None) -> list[int]:
    return [layer for layer in states.layers if only is None or layer in only]


def _batches(samples: Iterable[DiagnosticSample], size: int) -> Iterator[tuple[int, list[DiagnosticSample]]]:
    stream, start = iter(samples), 0
    while batch := list(islice(stream, size)):
        yield start, batch
        start += len(batch)


def _truth(samples: list[DiagnosticSample]) -> Tensor:
    return torch.stack([sample.truth for sample in samples])


def _report(progress: Any, count: int) -> None:
    if progress is not None:
        progress(count)
