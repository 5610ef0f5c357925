"""Distributed checkpoints of a loop of one's own, in the format of NeMo's runs: read at any layout, and exported.

A directory has the tensors in ``weights``, the run's configuration, and what makes damage known: sizes and checksums.
"""

from __future__ import annotations

import inspect as signatures
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingException
from torch import nn

from nemo_pre.checkpoint_files.inspection import damage_or_danger
from nemo_pre.checkpoint_files.metadata import WEIGHTS
from nemo_pre.compat import checkpoints
from nemo_pre.config.compose import save_resolved
from nemo_pre.config.run import RunConfig
from nemo_pre.neva.chunk import unwrapped
from nemo_pre.run_files.checkpoints import UNFINISHED, former_stage, record_progress, record_sizes
from nemo_pre.run_files.checksums import record_checksums

# How tensors are laid out: a decoder layer's is one row of a tensor of all layers, and the optimizer's lie parameter
# by parameter, so that neither depends on the layout they were saved at.
CONTENT = {
    "singleton_local_shards": False,
    "chained_optim_avoid_prefix": True,
    "distrib_optim_sharding_type": "fully_reshardable",
    "distrib_optim_fully_reshardable_mem_efficient": False,
}
PREFIX = "module."  # of the model's tensors, as in NeMo's checkpoints
STEP, SCHEDULER = "step", "opt_param_scheduler"


def save_checkpoint(
    directory: str | Path,
    model: Sequence[nn.Module],
    step: int,
    run: RunConfig,
    optimizer: Any = None,
    scheduler: Any = None,
) -> Path:
    """Save a checkpoint as ``directory/step=STEP``. Every rank must call it; it returns when all of it lies on disk.

    Args:
        model: the rank's chunks, wrapped or not.
        step: optimizer steps done.
        run: the configuration of the model, which export needs.
        optimizer, scheduler: Megatron's; None: the weights alone.

    Returns:
        The checkpoint.

    Raises:
        ValueError: there is one of this step already.
    """
    checkpoint = Path(directory) / f"step={step}"
    unfinished = checkpoint.with_name(checkpoint.name + UNFINISHED)
    _on_the_first_rank(lambda: _begin(checkpoint, unfinished))
    checkpoints.apply()  # checksums beside the tensors
    state = _sharded(model, optimizer, is_loading=False)
    state[STEP] = step
    if scheduler is not None:
        state[SCHEDULER] = scheduler.state_dict()
    dist_checkpointing.save(state, str(checkpoint / WEIGHTS), content_metadata=CONTENT, **_own_writer())
    dist.barrier()
    _on_the_first_rank(lambda: _finish(checkpoint, unfinished, step, run))
    return checkpoint


def load_checkpoint(path: str | Path, model: Sequence[nn.Module], optimizer: Any = None, scheduler: Any = None) -> int:
    """Load a checkpoint that was saved at any layout. Every rank must call it, after ``Objectives.install``.

    Args:
        path: a checkpoint, or a directory of them, whose newest is taken.
        model: the rank's chunks, wrapped or not.
        optimizer, scheduler: Megatron's; None: the weights alone.

    Returns:
        The optimizer steps done.

    Raises:
        ValueError: it is none, damaged, would run code when it is read, or lacks a tensor of the model.
    """
    found: list[str] = [""]
    _on_the_first_rank(lambda: found.__setitem__(0, former_stage(str(path), "path", _damage)))
    dist.broadcast_object_list(found, src=0)
    state = _sharded(model, optimizer, is_loading=True)
    try:
        loaded = dist_checkpointing.load(state, str(Path(found[0]) / WEIGHTS))
    except CheckpointingException as error:
        raise ValueError(f"{found[0]} cannot be loaded into this model: {str(error).splitlines()[0]}") from error
    for number, chunk in enumerate(model):
        values = {name.removeprefix(PREFIX): value for name, value in loaded[f"model_{number}"].items()}
        unwrapped(chunk).load_state_dict(values, strict=False)  # what the model has was asked of the checkpoint
    if optimizer is not None:
        optimizer.load_state_dict(loaded["optimizer"])
    if scheduler is not None:
        scheduler.load_state_dict(loaded[SCHEDULER])
    return int(loaded[STEP])


def _sharded(model: Sequence[nn.Module], optimizer: Any, is_loading: bool) -> dict[str, Any]:
    chunks: list[Any] = [unwrapped(chunk) for chunk in model]
    state: dict[str, Any] = {
        f"model_{number}": chunk.sharded_state_dict(prefix=PREFIX, metadata=CONTENT)
        for number, chunk in enumerate(chunks)
    }
    if optimizer is not None:
        weights = dict(state)
        state["optimizer"] = optimizer.sharded_state_dict(weights, is_loading=is_loading, metadata=CONTENT)
    return state


def _own_writer() -> dict[str, Any]:
    """Megatron 0.19 would write with another package's writer, which need not be there."""
    known = signatures.signature(dist_checkpointing.save).parameters
    return {"async_strategy": "mcore"} if "async_strategy" in known else {}


def _damage(checkpoint: Path) -> str:
    return damage_or_danger(checkpoint, alone=True)


def _begin(checkpoint: Path, unfinished: Path) -> None:
    if checkpoint.exists() and not unfinished.exists():
        raise ValueError(f"{checkpoint} is there already: remove it, or save under another directory.")
    (checkpoint / WEIGHTS).mkdir(parents=True, exist_ok=True)
    unfinished.touch()


def _finish(checkpoint: Path, unfinished: Path, step: int, run: RunConfig) -> None:
    save_resolved(run, checkpoint / "config.yaml")
    record_progress(checkpoint, step)
    record_checksums(checkpoint)
    record_sizes(checkpoint)
    unfinished.unlink()


def _on_the_first_rank(work: Callable[[], Any]) -> None:
    """Do the work on rank 0, and let every rank raise what it raises there."""
    problem: list[str | None] = [None]
    if dist.get_rank() == 0:
        try:
            work()
        except (ValueError, OSError) as error:
            problem[0] = str(error)
    dist.broadcast_object_list(problem, src=0)
    if problem[0] is not None:
        raise ValueError(problem[0])
