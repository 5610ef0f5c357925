"""Mixed attention without a mask: a few calls of plain attention for every row.

In the order of its sequence a run of text attends to everything before it and causally to itself, and a run of one
image's tokens to everything before the image and to all of it. So each run is one call of PyTorch's
scaled-dot-product attention, causal towards the lower right corner or full, which on a GPU is FlashAttention or
cuDNN's. Few long runs suit it (a conversation about an image has three); a row of many short samples has many.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right

from nemo_pre.device_copies import to_device
from nemo_pre.parallel.token_streams import IMAGE, ORDER, SEQUENCE


@dataclass(frozen=True)
class Run:
    """Neighbouring queries, and the keys they see, both in the order of the sequences.

    Attributes:
        causal: the last query sees all of the keys, each one before it one key less; else all see all.
    """

    queries: slice
    keys: slice
    causal: bool


@dataclass(frozen=True)
class RowRuns:
    """What a row's queries attend to.

    Attributes:
        query_order, key_order: where the tokens lie, in the order of the sequences; None: as they are.
        back: from there to where the queries lie; None likewise.
    """

    runs: list[Run]
    query_order: Tensor | None
    key_order: Tensor | None
    back: Tensor | None


def attend_runs(query: Tensor, key: Tensor, value: Tensor, rows: list[RowRuns], scale: float) -> Tensor:
    """Queries ``[B, N, Q, D]`` over keys and values ``[B, G, K, D]``, row by row and run by run."""
    attended = []
    for number, row in enumerate(rows):
        query_1, key_1, value_1 = (tensor[number : number + 1] for tensor in (query, key, value))
        if row.key_order is not None:
            key_1, value_1 = key_1.index_select(2, row.key_order), value_1.index_select(2, row.key_order)
        if row.query_order is not None:
            query_1 = query_1.index_select(2, row.query_order)
        context = torch.cat([_attend(query_1, key_1, value_1, run, scale) for run in row.runs], dim=2)
        attended.append(context if row.back is None else context.index_select(2, row.back))
    return torch.cat(attended)


def _attend(query: Tensor, key: Tensor, value: Tensor, run: Run, scale: float) -> Tensor:
    query, key, value = query[:, :, run.queries], key[:, :, run.keys], value[:, :, run.keys]
    mask = causal_lower_right(query.shape[2], key.shape[2]) if run.causal else None
    return F.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, scale=scale, enable_gqa=query.shape[1] != key.shape[1]
    )


def runs_of_rows(
    structure_BK3: Tensor, first_query: int, num_queries: int, device: torch.device | str | int
) -> list[RowRuns]:
    """The runs of every row, of the queries from ``first_query`` on.

    Args:
        structure_BK3: on the CPU; for one on a GPU it waits.
        device: of the queries.

    Raises:
        ValueError: the tokens of an image do not lie together.
    """
    return [_runs(row, first_query, num_queries, device) for row in structure_BK3.cpu().long()]


def _runs(structure_K3: Tensor, first_query: int, num_queries: int, device: torch.device | str | int) -> RowRuns:
    order = structure_K3[:, ORDER].argsort(stable=True)
    order = order[structure_K3[order, SEQUENCE].argsort(stable=True)]
    sequence, image = structure_K3[order, SEQUENCE], structure_K3[order, IMAGE]
    asks = (order >= first_query) & (order < first_query + num_queries)
    of_sequence = _first_of_run(sequence)
    of_image = _first_of_run(sequence, image)
    behind_image = _end_of_run(sequence, image)
    pictures = torch.stack([sequence, image])[:, image >= 0]
    if pictures.unique(dim=1).shape[1] != len(of_image[image >= 0].unique()):
        raise ValueError(
            "The tokens of an image do not lie together in its sequence: set model.attention_backend=dense."
        )
    starts = _first_of_run(sequence, image, asks).unique()
    stops = torch.cat([starts[1:], torch.tensor([len(order)])])
    runs, done = [], 0
    for start, stop in zip(starts.tolist(), stops.tolist(), strict=True):
        if not asks[start]:
            continue
        seen_to = int(behind_image[start]) if image[start] >= 0 else stop
        queries = slice(done, done + stop - start)
        runs.append(Run(queries, slice(int(of_sequence[start]), seen_to), causal=bool(image[start] < 0)))
        done = queries.stop
    query_order = order[asks] - first_query
    as_they_are = torch.equal(query_order, torch.arange(num_queries))
    return RowRuns(
        runs,
        query_order=None if as_they_are else to_device(query_order, device),
        key_order=None if torch.equal(order, torch.arange(len(order))) else to_device(order, device),
        back=None if as_they_are else to_device(query_order.argsort(), device),
    )


def _first_of_run(*fields: Tensor) -> Tensor:
    """The first place of every place's run; in a run all fields are alike."""
    changes = torch.zeros(len(fields[0]), dtype=torch.bool)
    changes[0] = True
    for field in fields:
        changes[1:] |= field[1:] != field[:-1]
    places = torch.arange(len(changes))
    return torch.where(changes, places, 0).cummax(0).values


def _end_of_run(*fields: Tensor) -> Tensor:
    """The place behind every place's run."""
    last = len(fields[0]) - 1
    return last + 1 - _first_of_run(*(field.flip(0) for field in fields)).flip(0)
