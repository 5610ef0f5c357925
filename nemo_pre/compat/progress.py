"""NeMo's progress printer without a collective: on CPUs and GPUs alike."""

from __future__ import annotations

from typing import Any

from nemo_pre.compat.registry import Change, patch


def _timers_of_this_rank(self: Any, timers: Any) -> str | None:
    lines = [
        f"    {(name + ' ').ljust(48, '.')}: {1000 * timer.elapsed(reset=True) / self.log_interval:.2f}"
        for name, timer in timers._timers.items()
    ]
    return "\n".join(["time on this rank (ms):", *lines, ""]) if lines else None


@patch(
    "progress-without-collective",
    why="NeMo's ProgressPrinter runs on rank 0 only and asks Megatron's timers for their values on all ranks, an"
    " all-gather that nobody else enters: the next collective of the default group (a checkpoint's) waits for ever.",
    until="ProgressPrinter.log_megatron_timers runs on every rank or asks its own timers only.",
    of={"nemo_toolkit": ("2.7.3",)},
)
def progress_without_collective():
    from nemo.lightning.pytorch.callbacks.progress_printer import ProgressPrinter

    yield Change(ProgressPrinter, "log_megatron_timers", _timers_of_this_rank, written_for="6887e1c5c857")


PATCHES = [progress_without_collective]


def apply() -> None:
    """Apply the patch; a second call does nothing."""
    progress_without_collective.apply()


def revert() -> None:
    """Restore what was there before :func:`apply`."""
    progress_without_collective.revert()
