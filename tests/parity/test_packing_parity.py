"""Samples packed into a row have the losses and gradients they have apart, in every layout.

The oracle takes the samples of a row one by one; the product runs the row at once.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.parity import test_laver_parity, test_parity
from tests.parity.layouts import EVERY_LAYOUT, num_steps
from tests.reference import tiny

ROWS = [  # images per sample: a micro-batch has two rows, of which each holds several samples
    [[(2, 0, 1), (3,)], [(0, 0), (1, 1)], [(1,), (0, 2, 1)], [(1, 1), (0, 1)]],
    [[(0, 0), (0, 0, 0)], [(0,), (0, 0)], [(0, 0), (0,)], [(0,), (0,)]],
    [[(1, 2), (0, 1, 0)], [(1, 0, 1), (2, 0)], [(3, 0), (1,)], [(0, 0), (1, 2)]],
]
MAX_LENGTH = 3 * tiny.MAX_LENGTH


def packed_batch(rows: list[tuple[int, ...]], seed: int) -> dict[str, Any]:
    """A micro-batch whose rows hold samples end to end; the shorter row is padded."""
    apart = [tiny.random_batch(images, seed=seed + 7 * row) for row, images in enumerate(rows)]
    length = max(batch["tokens"].numel() for batch in apart)

    def joined(values: list[torch.Tensor], padding: float) -> torch.Tensor:
        flat = [value.reshape(-1) for value in values]
        return torch.stack([torch.nn.functional.pad(v, (0, length - len(v)), value=padding) for v in flat])

    segments = [torch.arange(len(batch["tokens"]))[:, None].expand_as(batch["tokens"]) for batch in apart]
    padded = joined(segments, -1)
    media = [batch["media"] for batch in apart if batch["media"] is not None]
    return {
        "tokens": joined([batch["tokens"] for batch in apart], 0),
        "labels": joined([batch["labels"] for batch in apart], -100),
        "loss_mask": joined([batch["loss_mask"] for batch in apart], 0.0),
        "segments": torch.where(padded < 0, padded.max(dim=1, keepdim=True).values, padded),
        "position_ids": torch.arange(length).repeat(len(rows), 1),
        "attention_mask": None,
        "media": torch.cat(media) if media else None,
        "num_media_tiles": [1] * sum(map(sum, rows)),
    }


def steps(layout: dict[str, Any]) -> list[list[list[dict[str, Any]]]]:
    return [
        [
            [packed_batch(rows, seed=100 * step + 10 * rank + m) for m, rows in enumerate(ROWS[(step + rank) % 3])]
            for rank in range(layout.get("data", 1))
        ]
        for step in range(num_steps(layout))
    ]


@pytest.mark.parametrize("layout", EVERY_LAYOUT)
def test_packed_rows_of_a_causal_model_with_pre(layout):
    job, config = test_parity.case(layout, (2, 4))
    test_parity.check(replace(job, steps=steps(EVERY_LAYOUT[layout]), packing=True, max_length=MAX_LENGTH), config)


@pytest.mark.parametrize("layout", ["one-rank", "TP2-SP", "PP2", "CP2", "DP2", "TP2-SP-PP2-VPP2-CP2"])
def test_packed_rows_with_laver_mixed_attention_and_2d_rope(layout):
    job, config = test_laver_parity.case(layout)
    job = replace(job, steps=steps(EVERY_LAYOUT[layout]), packing=True, max_length=MAX_LENGTH)
    test_laver_parity.check(job, config)


@pytest.mark.parametrize("layout", ["one-rank", "CP2"])
def test_packed_rows_with_the_released_codes_laver(layout):
    job, config = test_laver_parity.case(layout, test_laver_parity.RELEASED_CODE, rope="mrope")
    job = replace(job, steps=steps(EVERY_LAYOUT[layout])[:1], packing=True, max_length=MAX_LENGTH)
    test_laver_parity.check(job, config)


def test_without_isolation_the_comparison_fails():
    """The test can fail: the same rows, run as if each were one sample."""
    job, config = test_parity.case("one-rank", (2,))
    apart = steps(EVERY_LAYOUT["one-rank"])
    for batch in (batch for step in apart for rank in step for batch in rank):
        batch["hidden"] = batch.pop("segments")
    records = test_parity.run(replace(job, steps=apart[:1], packing=True, max_length=MAX_LENGTH))
    for batch in apart[0][0]:
        batch["segments"] = batch.pop("hidden")
    expected = test_parity.oracle(job.state, config, apart[0])
    assert test_parity.disagreements(records[0], expected)
