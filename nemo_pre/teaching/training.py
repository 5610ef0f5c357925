"""The loop by which an encoder, or a small language model, is taught before a run."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor, nn

WEIGHT_DECAY, BETAS, WARMUP, MAX_GRADIENT = 0.05, (0.9, 0.95), 0.1, 1.0
REPORT_EVERY = 20.0  # seconds


def train(
    parameters: Iterable[nn.Parameter],
    loss_of_a_batch: Callable[[], Tensor],
    steps: int,
    learning_rate: float,
    name: str,
) -> None:
    """AdamW with one cycle of the learning rate; says under ``name`` how far it is."""
    import torch

    parameters = list(parameters)
    optimizer = torch.optim.AdamW(parameters, learning_rate, betas=BETAS, weight_decay=WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, steps, pct_start=WARMUP)
    started = told = time.monotonic()
    for step in range(1, steps + 1):
        loss = loss_of_a_batch()
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(parameters, MAX_GRADIENT)
        optimizer.step()
        schedule.step()
        if (now := time.monotonic()) - told > REPORT_EVERY or step == steps:
            left = (now - started) / step * (steps - step)
            print(f"{name}: step {step}/{steps}, loss {loss.item():.3f}, ETA {left:.0f} s", flush=True)
            told = now
