"""The loop by which an encoder, or a small language model, is taught before a run."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor, nn

WEIGHT_DECAY, BETAS, WARMUP, MAX_GRADIENT = 0.05, (0.9, 0.95), 0.1, 1.0
REPORT_EVERY, SAVE_EVERY = 20.0, 120.0  # seconds


def train(
    parameters: Iterable[nn.Parameter],
    loss_of_a_batch: Callable[[], Tensor],
    steps: int,
    learning_rate: float,
    name: str,
    state: Path | None = None,
) -> None:
    """AdamW with one cycle of the learning rate; says under ``name`` how far it is.

    Args:
        state: a file that a killed training goes on from, kept every ``SAVE_EVERY`` seconds and removed at the end.
            Batches must be drawn by torch's own generator, whose state it has, too.

    Raises:
        ValueError: ``state`` is of another training.
    """
    import torch

    parameters = list(parameters)
    optimizer = torch.optim.AdamW(parameters, learning_rate, betas=BETAS, weight_decay=WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, steps, pct_start=WARMUP)
    made_with = {"steps": steps, "rate": learning_rate, "shapes": [tuple(each.shape) for each in parameters]}
    done = 0 if state is None else _take_up(state, made_with, parameters, optimizer, schedule)
    started = told = saved = time.monotonic()
    for step in range(done + 1, steps + 1):
        loss = loss_of_a_batch()
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(parameters, MAX_GRADIENT)
        optimizer.step()
        schedule.step()
        if (now := time.monotonic()) - told > REPORT_EVERY or step == steps:
            left = (now - started) / (step - done) * (steps - step)
            print(f"{name}: step {step}/{steps}, loss {loss.item():.3f}, ETA {left:.0f} s", flush=True)
            told = now
        if state is not None and now - saved > SAVE_EVERY:
            _save(state, made_with, step, parameters, optimizer, schedule)
            saved = now
    if state is not None:
        state.unlink(missing_ok=True)


def _save(
    state: Path, made_with: Any, step: int, parameters: list[nn.Parameter], optimizer: Any, schedule: Any
) -> None:
    import torch

    content = {
        "made_with": made_with,
        "step": step,
        "parameters": [each.detach() for each in parameters],
        "optimizer": optimizer.state_dict(),
        "schedule": schedule.state_dict(),
        "generator": torch.get_rng_state(),
    }
    beside = state.with_name(state.name + ".tmp")
    torch.save(content, beside)
    os.replace(beside, state)


def _take_up(state: Path, made_with: Any, parameters: list[nn.Parameter], optimizer: Any, schedule: Any) -> int:
    """The steps that are done."""
    import torch

    if not state.is_file():
        return 0
    content = torch.load(state, weights_only=True)
    if content["made_with"] != made_with:
        raise ValueError(f"{state} is of a training with other options: remove it, or train as before.")
    with torch.no_grad():
        for each, kept in zip(parameters, content["parameters"], strict=True):
            each.copy_(kept)
    optimizer.load_state_dict(content["optimizer"])
    schedule.load_state_dict(content["schedule"])
    torch.set_rng_state(content["generator"])
    return int(content["step"])
