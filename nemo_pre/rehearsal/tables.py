"""A rehearsal in words and tables for a terminal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from nemo_pre.rehearsal.compare import Beside, Traffic, gib
from nemo_pre.rehearsal.found import Found, Lines

if TYPE_CHECKING:
    from nemo_pre.rehearsal.run import Rehearsed

NOT_COVERED = (
    "Transformer Engine's kernels (stand-ins keep, make and send what the sources of 2.9.0 say; assumed are cuDNN's "
    "attention, and no buffers while a kernel runs)",
    "FP8 arithmetic",
    "compilation, of FlexAttention and of Megatron's fused functions",
    "NCCL's, cuBLAS' and CUDA's buffers, and the allocator's fragmentation",
    "speed",
    "logging, validation and checkpoints",
)
SHOWN = 8  # lines of code of a list


def describe_rank(beside: Beside, found: Found, calls: Sequence[Traffic]) -> str:
    """What one rank found."""
    lines = [f"{beside.place} (rank {found.rank})"]
    kinds = list(beside.planned)
    lines.append(f"  {'GiB':14}" + "".join(f"{kind:>18}" for kind in [*kinds, "peak"]))
    for name, sizes, total in (
        ("rehearsed", beside.measured, beside.peak),
        ("planned", beside.planned, beside.plan),
    ):
        lines.append(
            f"  {name:14}" + "".join(f"{gib(sizes.get(kind, 0)):>18}" for kind in kinds) + f"{gib(total):>18}"
        )
    lines.append(
        f"  the plan is {beside.over:+.2%} of what was rehearsed; after a step {found.growth:+d} bytes are held"
    )
    lines += _listed(f"at the peak ({found.peak_line}), beside what stays", found.lines_at_peak, in_gib=True)
    kept = [(line, size) for line, size in found.kept if size >= 1 << 20]
    lines += _listed("held after a step beside what stays", kept, in_gib=True)
    forward = ", ".join(
        f"{measured / 1e12:.2f} (planned {planned / 1e12:.2f})" for measured, planned in beside.forward
    )
    lines.append(f"  TFLOP: {found.flops / 1e12:.1f} in the step; of a full micro-batch's forward pass {forward}")
    copies = sum(number for _, number in found.copies)
    lines.append(f"  kernels launched in its passes, at least: {found.kernels}; copies to the device: {copies}")
    lines += _listed(f"host waits for the device: {sum(n for _, n in found.waits)}", found.waits)
    for each in calls:
        planned = "" if each.planned is None else f" (planned {each.planned / 1e6:.2f})"
        lines.append(
            f"  {each.number:6} x {each.kind} over {each.ranks} ranks ({each.group}, {each.device}): "
            f"{each.bytes / 1e6:.2f} MB{planned}"
        )
    return "\n".join(lines)


def _listed(title: str, entries: Lines, in_gib: bool = False) -> list[str]:
    if not entries:
        return [f"  {title}" if title.startswith("host") else ""][: title.startswith("host")]
    shown = [f"    {gib(size) if in_gib else size:>8}  {line}" for line, size in entries[:SHOWN]]
    more = len(entries) - SHOWN
    return [f"  {title}:", *shown, *([f"    and {more} more lines"] if more > 0 else [])]


def describe(rehearsed: Rehearsed) -> str:
    """What a rehearsal found, for a terminal."""
    cut = "" if rehearsed.layers == rehearsed.all_layers else f" of {rehearsed.all_layers}: sizes are not the run's"
    parts = [
        f"rehearsal of {rehearsed.name}: {rehearsed.layers} decoder layers{cut}, {rehearsed.micro_batches} "
        f"micro-batches a step, trained by {rehearsed.backend}, {rehearsed.seconds:.0f} s",
        *(describe_rank(*each) for each in zip(rehearsed.besides, rehearsed.found, rehearsed.calls, strict=True)),
        _messages(rehearsed),
        "not covered: " + "; ".join(rehearsed.not_covered) + ".",
    ]
    if rehearsed.remarks:
        parts.append("\n".join(["remarks:", *(f"  {sentence}" for sentence in rehearsed.remarks)]))
    if rehearsed.problems:
        parts.append("\n".join(["problems:", *(f"  {sentence}" for sentence in rehearsed.problems)]))
    parts.append("verified on a GPU: never" + ("" if rehearsed.problems else "; no problem found"))
    return "\n\n".join(parts)


def _messages(rehearsed: Rehearsed) -> str:
    met = rehearsed.met
    if met is None:
        return "messages: not matched"
    how = "all ranks come to their end" if met.problem is None else "NOT all ranks come to their end"
    calls = f"{met.messages} messages and {met.collectives} collectives of {rehearsed.met_ranks} ranks"
    return f"messages: {calls} meet, {how}"
