"""Rows of several samples, as items and as a micro-batch; which samples share a row is planned in
:mod:`nemo_pre.data.packing`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from nemo_pre.data.collate import Collate
from nemo_pre.data.dataset import ConversationDataset, Item


class PackedDataset:
    """``dataset[samples]`` are the items of one row.

    A sample that could not be read has another in its place (``on_error=skip``); one that is too long for what is left
    of the row stays out of it and is counted as skipped.
    """

    def __init__(self, dataset: ConversationDataset) -> None:
        self.dataset, self.sizes = dataset, dataset.sizes
        self._how = dataset.preprocessing

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, samples: tuple[int, ...]) -> list[Item]:
        row, used = [], 0
        for sample in samples:
            item = self.dataset[sample]
            length = len(item.tokens) + sum(self._how.visual_tokens(image) - 1 for image in item.images)
            if used + length > self._how.sequence_length:
                self.dataset.pass_over(f"{item.key}, which replaces an unreadable sample, does not fit into its row")
                continue
            row.append(item)
            used += length
        return row

    def counts(self) -> dict[str, int]:
        return self.dataset.counts()


@dataclass(frozen=True)
class PackedCollate(Collate):
    """Collates B rows of items as :class:`Collate` does items. ``segments`` int64 [B, T] tells which of its row's
    samples a token belongs to; padding belongs to the last."""

    def __call__(self, rows: list[list[Item]]) -> dict[str, Any]:  # type: ignore[override]
        import torch

        batch = super().__call__([_joined(row) for row in rows])
        segments = torch.zeros_like(batch["tokens"])
        for row, items in enumerate(rows):
            numbers = [number for number, item in enumerate(items) for _ in item.tokens]
            segments[row, : len(numbers)] = torch.tensor(numbers, dtype=torch.int64)
            segments[row, len(numbers) :] = max(len(items) - 1, 0)
        return {**batch, "segments": segments}


def _joined(items: list[Item]) -> Item:
    """The items end to end. The last token of each predicts its own end, so no label crosses into the next."""
    return Item(
        key=" ".join(item.key for item in items),
        tokens=[token for item in items for token in item.tokens],
        labels=[label for item in items for label in item.labels],
        images=[image for item in items for image in item.images],
        pixels=[image for item in items for image in item.pixels],
        targets={
            name: [image for item in items for image in item.targets[name]]
            for name in (items[0].targets if items else {})
        },
    )
