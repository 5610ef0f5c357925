"""The run's seed and time-out, which NeMo's strategy takes (or has no argument for) and does not pass on.

from nemo_pre.compat import distributed_setup

distributed_setup.apply(seed, timeout)      before the trainer sets up its ranks; again, for another run
"""

from __future__ import annotations

import functools
from datetime import timedelta
from typing import Any

from nemo_pre.compat.registry import Change, Patch, patch


def seed_of_the_run(seed: int) -> Patch:
    @patch(
        "seed-of-the-run",
        why="MegatronStrategy sets up ranks with NeMo's default seed, 1234: random weights of the decoder would be the"
        " same in runs of every seed.",
        until="MegatronStrategy takes a seed.",
        of={"nemo_toolkit": ("2.7.3",)},
    )
    def effects():
        import nemo.lightning._strategy_lib as strategy_lib

        initialize = strategy_lib.initialize_model_parallel_for_nemo

        @functools.wraps(initialize)
        def with_seed(*args: Any, **kwargs: Any) -> Any:
            return initialize(*args, **{**kwargs, "seed": seed})

        yield Change(strategy_lib, "initialize_model_parallel_for_nemo", with_seed)

    return effects


def timeout_of_the_run(timeout: timedelta) -> Patch:
    @patch(
        "timeout-of-the-run",
        why="MegatronStrategy has an argument timeout and gives torch and Megatron none: their groups wait for their"
        " own 10 and 30 minutes.",
        until="MegatronStrategy.setup_distributed passes its timeout on, to init_process_group and to"
        " initialize_model_parallel.",
        of={"torch": ("2.9", "2.11"), "nemo_toolkit": ("2.7.3",)},
    )
    def effects():
        from megatron.core import parallel_state
        from torch.distributed import distributed_c10d

        initialize = parallel_state.initialize_model_parallel

        @functools.wraps(initialize)
        def with_timeout(*args: Any, **kwargs: Any) -> Any:
            return initialize(*args, **{**kwargs, "distributed_timeout_minutes": timeout.total_seconds() / 60})

        yield Change(parallel_state, "initialize_model_parallel", with_timeout)
        yield Change(distributed_c10d, "_get_default_timeout", lambda backend: timeout)

    return effects


_applied: list[Patch] = []


def apply(seed: int, timeout: timedelta) -> None:
    """Set up ranks with this seed, and let their collectives wait for this long.

    Raises:
        ValueError: a package has a version that the patches were not written for.
    """
    revert()
    for each in (seed_of_the_run(seed), timeout_of_the_run(timeout)):
        each.apply()
        _applied.append(each)


def revert() -> None:
    """Restore what was there before :func:`apply`."""
    while _applied:
        _applied.pop().revert()
