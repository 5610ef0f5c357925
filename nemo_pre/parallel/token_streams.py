"""Sequences that pass through the decoder side by side: the samples, and masked visual tokens.

Everything in a decoder layer but attention works token by token, so a second sequence is simply more tokens: it is
appended to each row of the micro-batch and crosses the pipeline in the same messages, and attention keeps the two
apart. What attention needs to know of a token is three numbers, its *structure*:

- the sequence it belongs to (tokens of different sequences never see each other),
- its order in the row (a token sees what is not after it),
- its image, -1 for none (tokens of one image see each other both ways: LaVer's mixed attention).

Sequence and context parallelism cut each sequence for itself and put a rank's pieces side by side, so that the
samples' part of the hidden states is a slice on every rank. After the tensor-parallel gather the tokens therefore lie
in the order of :func:`gathered_order`.

Shape suffixes: B micro-batch rows, S sequence, Q queries, K keys.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from nemo_pre.device_copies import to_device
from nemo_pre.parallel.rotary_positions import rotary_positions
from nemo_pre.parallel.sequence_layout import SequenceLayout, local_positions

SEQUENCE, ORDER, IMAGE = 0, 1, 2
SAMPLES = 0  # the sequence id of the samples themselves; of packed ones -1, -2 and so on after the first
BRANCH = 1  # of a branch that is one sequence, and of a packed branch's padding; its images follow


@dataclass(frozen=True)
class VisualBranch:
    """The sequence that runs beside the samples.

    Attributes:
        layout: which visual (or text) token lies where.
        masked_N: by the number of the visual token, whether the student sees the mask token in its place.
        isolated_images: each image is a sequence of its own (the paper); else a row is one sequence, text included
            (the released code).
        images_together: one rank is given all images of the micro-batch for the Gram term.
    """

    layout: SequenceLayout
    masked_N: Tensor
    isolated_images: bool
    images_together: bool = False

    @property
    def masked_BS(self) -> Tensor:
        source_BS = self.layout.visual_source_BS
        return (source_BS >= 0) & self.masked_N[source_BS.clamp(min=0)] if len(self.masked_N) else source_BS >= 0

    @property
    def num_masked(self) -> int:
        return int(self.masked_BS.sum())


@dataclass(frozen=True)
class StreamShape:
    """How tokens attend and are placed, and how sequences are cut over ranks.

    Attributes:
        mixed_attention: tokens of one image see each other both ways.
        rope: see :func:`nemo_pre.parallel.rotary_positions.rotary_positions`.
        tp_size: ranks of sequence parallelism, 1 without it.
        packed: rows may hold several samples.
        structure_on_host: attention works out from the structure what it calls, so that it stays on the CPU.
    """

    mixed_attention: bool
    rope: str
    tp_size: int = 1
    cp_size: int = 1
    cp_rank: int = 0
    packed: bool = False
    structure_on_host: bool = False


@dataclass(frozen=True)
class DecoderStreams:
    """What the decoder is told of its tokens on one rank, for the student (samples and branch) or the teacher.

    Attributes:
        lengths: tokens per row of each sequence on this rank.
        structure_BK3: int32, of all context ranks' tokens in gathered order; None for plain causal attention.
        positions_3BQ: rotary positions of this context rank's tokens in gathered order.
        structure_on_host: see :class:`StreamShape`.
    """

    lengths: tuple[int, ...]
    structure_BK3: Tensor | None
    positions_3BQ: Tensor
    structure_on_host: bool = False

    def to(self, device: torch.device | str | int) -> DecoderStreams:
        structure = self.structure_BK3
        if structure is not None and not self.structure_on_host:
            structure = to_device(structure, device)
        return replace(self, structure_BK3=structure, positions_3BQ=to_device(self.positions_3BQ, device))


def decoder_streams(samples: SequenceLayout | None, branch: VisualBranch | None, shape: StreamShape) -> DecoderStreams:
    """The structure and positions of ``samples`` and ``branch``, of which one may be missing."""
    structures, positions = [], []
    if samples is not None:
        structures.append(samples_structure(samples, shape.mixed_attention))
        positions.append(rotary_positions(samples, samples.grids_T2, shape.rope))
    if branch is not None:
        image_BS = branch.layout.visual_image_BS
        own_sequence = (image_BS if branch.isolated_images else branch.layout.segment_BS - 1) + BRANCH + 1
        structures.append(_structure(branch.layout, own_sequence, shape.mixed_attention or branch.isolated_images))
        positions.append(rotary_positions(branch.layout, branch.layout.grids_T2, shape.rope, branch.isolated_images))
    lengths = [structure.shape[1] for structure in structures]
    order_K = gathered_order(lengths, shape.tp_size, shape.cp_size)
    here_Q = order_K.view(shape.cp_size, -1)[shape.cp_rank]
    needed = branch is not None or shape.mixed_attention or shape.packed
    return DecoderStreams(
        lengths=tuple(length // (shape.tp_size * shape.cp_size) for length in lengths),
        structure_BK3=torch.cat(structures, dim=1)[:, order_K].contiguous() if needed else None,
        positions_3BQ=torch.cat(positions, dim=2)[:, :, here_Q].contiguous(),
        structure_on_host=shape.structure_on_host,
    )


def samples_structure(layout: SequenceLayout, mixed_attention: bool) -> Tensor:
    """The structure ``[B, S, 3]`` of the samples alone, in the order of the sequence."""
    return _structure(layout, SAMPLES - layout.segment_BS, mixed_attention)


def _structure(layout: SequenceLayout, sequence_BS: Tensor, both_ways: bool) -> Tensor:
    order_BS = torch.arange(layout.sequence_length).expand_as(sequence_BS)
    image_BS = layout.visual_image_BS if both_ways else torch.full_like(sequence_BS, -1)
    return torch.stack([sequence_BS, order_BS, image_BS], dim=-1).int()


def may_attend(queries_BQ3: Tensor, keys_BK3: Tensor) -> Tensor:
    """Boolean ``[B, Q, K]``: which keys each query sees. No query is without a key: a token sees itself."""
    query, key = queries_BQ3[:, :, None], keys_BK3[:, None]
    not_after = key[..., ORDER] <= query[..., ORDER]
    same_image = (key[..., IMAGE] == query[..., IMAGE]) & (query[..., IMAGE] >= 0)
    return (key[..., SEQUENCE] == query[..., SEQUENCE]) & (not_after | same_image)


def gathered_order(lengths: Sequence[int], tp_size: int, cp_size: int) -> Tensor:
    """Where, in the concatenated sequences, each token lies that attention sees: context rank by context rank, in it
    tensor-parallel rank by rank (``tp_size`` 1 without sequence parallelism), in it sequence by sequence."""
    pieces = []
    for cp_rank in range(cp_size):
        for tp_rank in range(tp_size):
            start = 0
            for length in lengths:
                pieces.append(start + local_positions(length, tp_size, tp_rank, cp_size, cp_rank))
                start += length
    return torch.cat(pieces)


# --- the branch -----------------------------------------------------------------------------------------------------


def image_rows(layout: SequenceLayout) -> list[list[int]]:
    """Which images go into which row of a packed branch: as many rows as samples, filled evenly.

    Largest image first into the row with the fewest tokens; deterministic.
    """
    rows: list[list[int]] = [[] for _ in range(layout.visual_image_BS.shape[0])]
    load = [0] * len(rows)
    for image, size in sorted(image_sizes(layout).items(), key=lambda item: (-item[1], item[0])):
        row = load.index(min(load))
        rows[row].append(image)
        load[row] += size
    return rows


def image_sizes(layout: SequenceLayout) -> dict[int, int]:
    """Visual tokens in the sequence of every image that has any."""
    images, sizes = layout.visual_image_BS[layout.visual_image_BS >= 0].unique(return_counts=True)
    return dict(zip(images.tolist(), sizes.tolist(), strict=True))


def packed_length(layout: SequenceLayout, rows: list[list[int]]) -> int:
    """Tokens of the fullest row."""
    sizes = image_sizes(layout)
    return max((sum(sizes[image] for image in row) for row in rows), default=0)


def packed_images(layout: SequenceLayout, rows: list[list[int]], length: int) -> SequenceLayout:
    """The visual tokens of ``layout`` without its text: images one after another in their rows, then padding."""
    source = torch.full((len(rows), length), -1, dtype=torch.int64)
    image_of = torch.full_like(source, -1)
    for row, images in enumerate(rows):
        start = 0
        for image in images:
            tokens = layout.visual_source_BS[layout.visual_image_BS == image]
            source[row, start : start + len(tokens)] = tokens
            image_of[row, start : start + len(tokens)] = image
            start += len(tokens)
    return replace(
        layout,
        text_source_BS=torch.full_like(source, -1),
        visual_source_BS=source,
        visual_image_BS=image_of,
        segment_BS=torch.zeros_like(source),
    )
