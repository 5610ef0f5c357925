"""A training on ranks that have trained before is the training of new processes, bit for bit."""

from __future__ import annotations

import importlib
import logging
import os
import sys
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.parity import test_laver_parity, test_parity
from tests.parity.job import Job, train
from tests.ranks import RankError, Ranks

FAMILIES = ("megatron", "nemo", "nemo_pre")
# What a training changes for good in a process, and why no other training can tell.
HARMLESS = {
    "nemo.utils.nvtx _nvtx_enabled.cached": "whether an environment variable asks for profiling",
    "nemo_pre.compat.cpu_adamw GroupStepAdamW.step": "torch marks the method as known to its profiler, once",
    "nemo_pre.neva.mixed_attention _MASKS._masks": "found by the address of a tensor that it keeps alive",
}


def unlike_each_other() -> dict[str, Job]:
    """Trainings on two ranks that differ in all that a process could remember."""
    laver, _ = test_laver_parity.case("PP2-VPP2", test_laver_parity.RELEASED_CODE, rope="mrope")
    sharded, _ = test_parity.case("DP2-sharded-optimizer", (1, 3), pre={"variant": "global"}, precision="bf16")
    spoilt, _ = test_parity.case("TP2-SP", num_microbatches=1, gradient_factor=2.0)
    means, _ = test_parity.case("CP2", parallel={"recompute": "full"}, max_length=12)
    return {"laver": laver, "sharded": sharded, "spoilt": spoilt, "cut": means}


@pytest.fixture(scope="module")
def alone() -> dict[str, Any]:
    """What each training gives in new processes."""
    found = {}
    for name, job in unlike_each_other().items():
        with Ranks(2) as ranks:
            found[name] = ranks.run(train, job)
    return found


@pytest.mark.parametrize("order", [("laver", "sharded", "spoilt", "cut"), ("cut", "spoilt", "sharded", "laver")])
def test_a_training_is_the_same_alone_and_after_others(order, alone):
    jobs = unlike_each_other()
    with Ranks(2) as ranks:
        for name in order:
            for rank, (found, expected) in enumerate(zip(ranks.run(train, jobs[name]), alone[name], strict=True)):
                for step, (mine, its) in enumerate(zip(found, expected, strict=True)):
                    assert mine.metrics == its.metrics, (name, rank, step)
                    assert len(mine.masks) == len(its.masks) and all(map(torch.equal, mine.masks, its.masks))
                    assert [shard.name for shard in mine.gradients] == [shard.name for shard in its.gradients]
                    unequal = [
                        shard.name
                        for shard, other in zip(mine.gradients, its.gradients, strict=True)
                        if not torch.equal(shard.data, other.data)
                    ]
                    assert not unequal, (name, rank, step)


def test_nothing_of_a_training_is_left_in_modules():
    """But for what is HARMLESS; everything the training imports is imported before it here."""
    job = unlike_each_other()["laver"]
    with Ranks(2) as ranks:
        ranks.run(train, job)
        imported, _ = ranks.run(imported_modules)
    with Ranks(2) as ranks:
        before = ranks.run(module_globals, imported)
        ranks.run(train, job)
        after = ranks.run(module_globals, imported)
    for rank, (old, new) in enumerate(zip(before, after, strict=True)):
        assert len(old) > 10_000
        changed = {
            name: (old.get(name), new.get(name)) for name in old.keys() | new.keys() if old.get(name) != new.get(name)
        }
        assert changed.keys() <= HARMLESS.keys(), (rank, {n: c for n, c in changed.items() if n not in HARMLESS})


def test_a_training_that_fails_fails_alone():
    job, config = test_parity.case("PP2")
    with pytest.raises(RankError, match="no_such_setting"):
        test_parity.run(replace(job, settings={"no_such_setting": 1}))
    test_parity.check(job, config)


def imported_modules() -> list[str]:
    return [name for name in sys.modules if name.split(".")[0] in FAMILIES]


def module_globals(imported: list[str]) -> dict[str, Any]:
    """What modules of Megatron, NeMo and the product hold: values where they are plain, identities otherwise."""

    def content(value: Any, depth: int = 0) -> Any:
        kind = type(value)  # not isinstance, which lazy proxies answer by importing what they stand for
        if kind in (int, float, str, bool, type(None)):
            return value
        if issubclass(kind, dict) and depth < 2:
            return [(repr(key), content(item, depth + 1)) for key, item in dict.items(value)]
        if issubclass(kind, list | tuple | set) and depth < 2:
            return [content(item, depth + 1) for item in value]
        return id(value)

    def attributes(value: Any, module: str) -> Iterator[tuple[str, Any]]:
        kind = type(value)
        if kind.__name__ == "_lru_cache_wrapper":
            yield "cached", value.cache_info().currsize
        elif value.__module__ == module if issubclass(kind, type) else kind.__module__.split(".")[0] in FAMILIES:
            try:
                yield from list(object.__getattribute__(value, "__dict__").items())
            except AttributeError:
                return

    from nemo_pre.compat import cpu_backend, learning_rates

    cpu_backend.apply()
    learning_rates.apply()
    found = {}
    for name, module in [(name, importlib.import_module(name)) for name in imported]:
        for attribute, value in list(vars(module).items()):
            if attribute.startswith("__") or issubclass(type(value), logging.Logger) or type(value) is type(sys):
                continue
            found[f"{name} {attribute}"] = content(value)
            for inner, item in attributes(value, name):
                if not inner.startswith("__"):
                    found[f"{name} {attribute}.{inner}"] = content(item, 1)
    return found


def number_of_threads() -> int:
    return len(os.listdir("/proc/self/task"))


def test_a_training_leaves_no_thread_behind() -> None:
    """A process group that somebody holds keeps its threads; after some hundred jobs a machine has too many."""
    job, _ = test_parity.case("PP2", (3,))
    with Ranks(2) as ranks:
        before = ranks.run(number_of_threads)
        ranks.run(train, job, timeout=300)
        assert ranks.run(number_of_threads) == before
