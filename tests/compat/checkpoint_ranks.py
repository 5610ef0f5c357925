"""What the ranks of tests/compat/test_checkpoints.py do."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any

from tests.compat import tiny_gpt
from tests.compat.tiny_gpt import Layout, Run
from tests.ranks.sharded import load_full


def _metadata(sharding: str) -> dict[str, Any]:
    return {
        "distrib_optim_sharding_type": sharding,
        "distrib_optim_fully_reshardable_mem_efficient": False,
        "chained_optim_avoid_prefix": True,
        "singleton_local_shards": False,
    }


def _sharded_state(run: Run, sharding: str, is_loading: bool = False) -> dict[str, Any]:
    (module,) = tiny_gpt.modules(run)
    metadata = _metadata(sharding)
    model = module.sharded_state_dict(metadata=metadata)
    return {
        "model": model,
        "optimizer": run.optimizer.sharded_state_dict(model, is_loading=is_loading, metadata=metadata),
    }


def train_save_train(
    layout: Layout, weights: dict[str, Any], directory: Path, sharding: str, asynchronous: bool = False
) -> tuple[list[float], bool]:
    """Three steps, a checkpoint, three steps; the losses of the last three, and whether these overlapped writing."""
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue

    run = tiny_gpt.start(layout)
    load_full(tiny_gpt.modules(run), weights)
    run.optimizer.reload_model_params()
    tiny_gpt.train(run, steps=3)
    state = _sharded_state(run, sharding)
    if not asynchronous:
        dist_checkpointing.save(state, str(directory))
        return tiny_gpt.train(run, steps=3, first_step=3), False
    request = dist_checkpointing.save(state, str(directory), async_sharded_save=True)
    writer = _Held(request.async_fn)  # until training has changed every parameter
    queue = AsyncCallsQueue()
    queue.schedule_async_request(request._replace(async_fn=writer))
    losses = tiny_gpt.train(run, steps=3, first_step=3)
    overlapped = queue.get_num_unfinalized_calls() == 1 and not (directory / "metadata.json").exists()
    writer.release()
    queue.maybe_finalize_async_calls(blocking=True)
    return losses, overlapped and (directory / "metadata.json").exists()


def two_saves_at_once(layout: Layout, weights: dict[str, Any], first: Path, second: Path) -> None:
    """A full checkpoint whose writers are held back, and one of the model alone that overtakes it."""
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue

    run = tiny_gpt.start(layout)
    load_full(tiny_gpt.modules(run), weights)
    run.optimizer.reload_model_params()
    tiny_gpt.train(run, steps=1)
    state = _sharded_state(run, "fully_reshardable")
    slow = dist_checkpointing.save(state, str(first), async_sharded_save=True)
    queue = AsyncCallsQueue()
    writer = _Held(slow.async_fn)
    queue.schedule_async_request(slow._replace(async_fn=writer))
    fast = dist_checkpointing.save({"model": state["model"]}, str(second), async_sharded_save=True)
    queue.schedule_async_request(fast)
    queue.async_calls[1].async_caller.process.join()
    writer.release()
    queue.maybe_finalize_async_calls(blocking=True)


def modules_of_the_results_server() -> str:
    """What the process that hands a save's results on, which earlier saves have started, has mapped."""
    import multiprocessing

    (server,) = (each for each in multiprocessing.active_children() if each.name.startswith("SyncManager"))
    return Path(f"/proc/{server.pid}/maps").read_text()


class _Held:
    """The writer of a checkpoint, kept from writing until ``release``."""

    def __init__(self, write: Any):
        self.write = write
        self.go = Path(tempfile.mkdtemp()) / "go"  # a file, because the writer is another process

    def release(self) -> None:
        self.go.touch()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        give_up = time.monotonic() + 60
        while not self.go.exists():
            assert time.monotonic() < give_up, "the writer was not released"
            time.sleep(0.02)
        return self.write(*args, **kwargs)


def load_save_train(layout: Layout, source: Path, copy: Path, sharding: str) -> list[float]:
    """Load a checkpoint, save what was loaded, and train three steps more; their losses."""
    from megatron.core import dist_checkpointing

    run = tiny_gpt.start(layout)
    loaded = dist_checkpointing.load(_sharded_state(run, sharding, is_loading=True), str(source))
    tiny_gpt.modules(run)[0].load_state_dict(loaded["model"])
    run.optimizer.load_state_dict(loaded["optimizer"])
    dist_checkpointing.save(_sharded_state(run, sharding), str(copy))
    return tiny_gpt.train(run, steps=3, first_step=3)


def contents(directory: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Every tensor of a checkpoint in full, and the optimizer's parameter groups."""
    tiny_gpt.start(Layout(), use_optimizer=False)
    import torch
    from megatron.core import dist_checkpointing

    everything = dist_checkpointing.load_plain_tensors(str(directory))
    tensors = {name: value for name, value in everything.items() if isinstance(value, torch.Tensor)}
    common = dist_checkpointing.load_common_state_dict(str(directory))
    optimizer = common.get("optimizer", {})
    groups = optimizer.get("optimizer", optimizer).get("param_groups", [])
    return tensors, [{k: v for k, v in group.items() if k != "params"} for group in groups]
