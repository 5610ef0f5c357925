"""The pictures of a composed scene, each by itself: what its visual tokens hold, and what they would say.

An object's state is the mean of its picture's visual tokens, each weighted by the share of the object that lies in
its patch. Linear probes (:mod:`.probe`) read its concept (one of all that the fit set shows: often a thousand), its
category, its colour and its place off it. The logit lens asks the token of the patch that shows most of it, through
the final norm and the output layer, whether it says the concept's name: its first token, with or without a capital,
with or without a space before.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from nemo_pre.diagnostics.probe import ProbeScore, ProbeTask

if TYPE_CHECKING:
    from nemo_pre.diagnostics.samples import DiagnosticSample
    from nemo_pre.diagnostics.states import Model, VisualStates

MOST_OBJECTS = 5  # that a scene shows
FIELDS = {"concept": "name", "category": "category", "colour": "colour", "place": "place"}  # probe, in the records
SAID_AMONG = 10  # words that the lens counts a name among


@dataclass(frozen=True)
class SceneObject:
    """``instance``: its number in the mask; ``truth`` ``[C]``: the tasks' indicators side by side, zeros where the
    records say nothing."""

    instance: int
    name: str
    truth: Tensor


@dataclass(frozen=True)
class ObjectClasses:
    """The classes of each probe's task that a fit set shows, in order."""

    classes: dict[str, list[str]]

    @classmethod
    def of_scenes(cls, scenes: Iterable[Sequence[dict[str, Any]]]) -> ObjectClasses:
        """The classes of the pictures of all ``scenes``, as the records have them."""
        found: dict[str, set[str]] = {task: set() for task in FIELDS}
        for pictures in scenes:
            for placed in pictures:
                for task, name in FIELDS.items():
                    if placed[name] is not None:
                        found[task].add(placed[name])
        return cls({task: sorted(values) for task, values in found.items()})

    @property
    def tasks(self) -> list[ProbeTask]:
        return [ProbeTask(task, len(values)) for task, values in self.classes.items()]

    def of_scene(self, pictures: Sequence[dict[str, Any]]) -> tuple[SceneObject, ...]:
        return tuple(SceneObject(placed["instance"], placed["name"], self._truth(placed)) for placed in pictures)

    def _truth(self, placed: dict[str, Any]) -> Tensor:
        parts = []
        for task, values in self.classes.items():
            value = placed[FIELDS[task]]
            row = torch.zeros(len(values))
            if value in values:
                row[values.index(value)] = 1.0
            parts.append(row)
        return torch.cat(parts)


def coverage(instances_PK: Tensor, numbers: Sequence[int]) -> Tensor:
    """``[objects, P]``: of each object, the share of its pixels that lies in each patch; zeros for one that is not
    there.

    Args:
        instances_PK: ``[patches, pixels]`` the object's number at each pixel.
        numbers: of the objects asked for.
    """
    pixels = torch.stack([(instances_PK == number).sum(1) for number in numbers]).float()
    return pixels / pixels.sum(1, keepdim=True).clamp(min=1)


@dataclass(frozen=True)
class ObjectsOfBatch:
    """The objects of a batch of pictures, where a patch shows them.

    Attributes:
        weights: ``[objects, n]`` what each of the batch's visual tokens counts in an object's mean.
        truth: ``[objects, C]``; names: of each.
        picture: ``[objects]`` which picture of the batch each is in.
    """

    weights: Tensor
    truth: Tensor
    names: list[str]
    picture: Tensor

    @classmethod
    def of(cls, samples: Sequence[DiagnosticSample], states: VisualStates) -> ObjectsOfBatch:
        rows, truth, names, picture = [], [], [], []
        image = states.image.cpu()
        starts = torch.searchsorted(image, torch.arange(len(samples)))
        for number, (sample, grid, patches) in enumerate(zip(samples, states.grids, states.instances, strict=True)):
            if not sample.objects:
                continue
            shares = coverage(patches, [each.instance for each in sample.objects])
            start = int(starts[number]) + grid.first
            for each, share in zip(sample.objects, shares, strict=True):
                if share.sum() > 0:
                    row = torch.zeros(len(image))
                    row[start : start + grid.size] = share
                    rows.append(row)
                    truth.append(each.truth)
                    names.append(each.name)
                    picture.append(number)
        if not rows:
            width = next((len(each.truth) for sample in samples for each in sample.objects), 0)
            return cls(torch.zeros(0, len(image)), torch.zeros(0, width), [], torch.zeros(0, dtype=torch.int64))
        return cls(torch.stack(rows), torch.stack(truth), names, torch.tensor(picture))

    def means(self, tokens: Tensor) -> Tensor:
        """``[objects, d]`` in float64, of a layer's tokens ``[n, d]``."""
        return self.weights.to(tokens.device).double() @ tokens.double()

    def shown_most(self, tokens: Tensor) -> Tensor:
        """``[objects, d]``: the token of the patch that shows most of each."""
        return tokens[self.weights.argmax(1).to(tokens.device)]


class Names:
    """The tokens that would begin a name."""

    def __init__(self, model: Model) -> None:
        self._model = model
        self._known: dict[str, list[int]] = {}

    def first_tokens(self, name: str) -> list[int]:
        if name not in self._known:
            forms = {form for word in (name, name[:1].upper() + name[1:]) for form in (word, " " + word)}
            self._known[name] = sorted({self._model.token_ids(form)[0] for form in forms})
        return self._known[name]


@dataclass
class ObjectMeasures:
    """The sums of one layer over objects."""

    score: ProbeScore
    tasks: dict[str, tuple[int, int]] = field(default_factory=dict)  # right, asked
    said: int = 0
    said_among: int = 0
    asked: int = 0

    def update(self, tokens: Tensor, objects: ObjectsOfBatch, names: Names, scores: Tensor) -> None:
        """Add objects; ``scores`` ``[objects, vocabulary]``, of :meth:`ObjectsOfBatch.shown_most`."""
        predicted = self.score.probe.predict(objects.means(tokens)).cpu()
        sizes = [task.size for task in self.score.probe.tasks]
        parts = zip(self.score.probe.tasks, predicted.split(sizes, 1), objects.truth.split(sizes, 1), strict=True)
        for task, guess, truth in parts:
            told = truth.sum(1) > 0
            right, asked = self.tasks.get(task.name, (0, 0))
            found = int(task.correct(guess[told], truth[told]).sum()) if told.any() else 0
            self.tasks[task.name] = (right + found, asked + int(told.sum()))
        best = scores.topk(min(SAID_AMONG, scores.shape[1])).indices.tolist()
        for name, words in zip(objects.names, best, strict=True):
            wanted = set(names.first_tokens(name))
            self.said += words[0] in wanted
            self.said_among += bool(wanted & {*words})
            self.asked += 1

    def result(self) -> dict[str, Any]:
        """Shares of right answers with Wilson's intervals, and of objects whose token says the name."""
        from nemo_pre.report.intervals import wilson

        found: dict[str, Any] = {"objects": self.asked}
        for task, (right, asked) in self.tasks.items():
            if asked:
                low, high = wilson(right, asked)
                found[task] = {"accuracy": right / asked, "low": low, "high": high, "asked": asked}
        if self.asked:
            found["says_name"] = self.said / self.asked
            found[f"says_name_among_{SAID_AMONG}"] = self.said_among / self.asked
        return found
