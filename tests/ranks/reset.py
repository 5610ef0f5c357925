"""What a job leaves behind in its process, and how the next one is spared it.

A rank that runs several jobs must be to each what a new process would be. What Megatron, NeMo and Lightning keep in
modules is put back to what it was before the first job; compatibility patches that are the same for every run stay.
``tests/parity/test_isolation.py`` looks through all modules for what is left.
"""

from __future__ import annotations

import gc
import importlib
import os
import random
import re
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from tests.backend import BACKEND, NEMO

# Modules that keep a run's state in their globals, and which globals those are.
LOOPS = tuple(f"lightning.pytorch.loops.{loop}_loop" for loop in ("fit", "evaluation", "prediction"))
KEEPERS = {
    "megatron.core.parallel_state": r"_[A-Z0-9_]+|_global_process_group_list",
    "megatron.core.num_microbatches_calculator": r"_[A-Z0-9_]+",
    "megatron.core.rerun_state_machine": r"_[A-Z0-9_]+",
    "megatron.core.tensor_parallel.random": r"_[A-Z0-9_]+",
}
if BACKEND == NEMO:  # whose strategy wraps it, once more for every trainer
    KEEPERS |= dict.fromkeys(LOOPS, "_select_data_fetcher")


@dataclass
class Beginning:
    """What the process was like before its first job."""

    environment: dict[str, str]
    globals: dict[str, dict[str, Any]]
    random_states: tuple[Any, ...]

    @classmethod
    def of_this_process(cls) -> Beginning:
        import numpy
        import torch

        return cls(
            dict(os.environ),
            {name: _kept(importlib.import_module(name), pattern) for name, pattern in KEEPERS.items()},
            (random.getstate(), numpy.random.get_state(), torch.get_rng_state()),  # noqa: NPY002 - what NeMo seeds
        )

    def restore(self) -> None:
        """Forget the job: its process groups, what modules keep of it, its variables and its random numbers."""
        import numpy
        import torch
        import torch.distributed as dist
        from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding

        from nemo_pre.compat import distributed_setup

        if dist.is_initialized():
            dist.destroy_process_group()  # every group
        # Its cache of methods' results holds modules, and with one a process group and its threads.
        RotaryEmbedding.forward.cache_clear()
        _empty_what_holds_groups()
        for name, values in self.globals.items():
            vars(importlib.import_module(name)).update(values)
        if BACKEND == NEMO:
            from nemo.utils.app_state import AppState
            from nemo.utils.metaclasses import Singleton

            Singleton._Singleton__instances.pop(AppState, None)
        distributed_setup.revert()  # the run's seed and time-out
        os.environ.clear()
        os.environ.update(self.environment)
        python, numbers, tensors = self.random_states
        random.setstate(python)
        numpy.random.set_state(numbers)  # noqa: NPY002
        torch.set_rng_state(tensors)
        gc.collect()


def _empty_what_holds_groups() -> None:
    """Take from a former job's models and optimizers whatever they have. Compiled code that no collection sees holds
    them after a run with the distributed optimizer, and with them process groups and 50 threads. Of modules that were
    there before the first job nothing is seen here: they are frozen (:mod:`tests.ranks.warm`)."""
    from megatron.core.optimizer.optimizer import MegatronOptimizer
    from torch import nn

    for left in gc.get_objects():
        if isinstance(left, nn.Module | MegatronOptimizer) or type(left).__name__ == "_ParamAndGradBucketGroup":
            vars(left).clear()


def _kept(module: ModuleType, pattern: str) -> dict[str, Any]:
    return {name: value for name, value in vars(module).items() if re.fullmatch(pattern, name)}
