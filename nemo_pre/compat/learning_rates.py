"""A learning rate per module: on CPUs and GPUs alike.

    from nemo_pre.compat import learning_rates

    learning_rates.apply()
    optim = nl.MegatronOptimizerModule(config, lr_scheduler=..., scale_lr_cond=learning_rates.PerParameter(multiplier))

with ``multiplier(name, parameter) -> float`` relative to ``config.lr``. Where each number goes:

* ``_get_param_groups`` (Megatron) makes a group per multiplier, with ``lr_mult``.
* ``setup_megatron_optimizer`` (NeMo) sets ``lr = lr * lr_mult`` once and renames ``lr_mult`` to ``pre_lr_mult``, so
  that nothing multiplies again; ``pre_mult_lr`` keeps the unscaled rate. Megatron's own scheduler is not used.
* NeMo's schedulers then overwrite ``lr`` at every step, from a list ``base_lrs`` with one absolute ``min_lr`` for all
  groups. Here they compute the unscaled schedule and multiply it by the group's own ``pre_lr_mult``: the floor scales
  along, and 0 stays 0 for the whole run.

A resumed run has the groups and the schedule of its own options, also where these are others than the checkpoint's:
of the groups there it takes the count of optimizer steps, of the scheduler the place in the schedule, and of the
parameters' states, which lie in the checkpoint by the names of the parameters, everything.
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from nemo_pre.compat.registry import Change, patch


@dataclass(frozen=True)
class PerParameter:
    """``scale_lr_cond`` of Megatron's optimizer, giving a multiplier of the learning rate instead of yes or no.

    ``multiplier(name, parameter)`` is called with the parameter's name in its model chunk, which begins with the
    wrappers' ``module.``; 0.0 is a true zero: neither the gradient nor weight decay moves the parameter.
    """

    multiplier: Callable[[str, Any], float]

    def __call__(self, name: str, parameter: Any) -> float:
        value = float(self.multiplier(name, parameter))
        if not (math.isfinite(value) and value >= 0.0):
            raise ValueError(f"the learning-rate multiplier of {name} is {value}; it must be finite and not negative.")
        return value


class _Only:
    """A model chunk reduced to the trainable parameters of one multiplier."""

    def __init__(self, named_parameters: list[tuple[str, Any]]):
        self._named_parameters = named_parameters

    def named_parameters(self) -> Iterator[tuple[str, Any]]:
        return iter(self._named_parameters)


def _always(name: str, parameter: Any) -> bool:
    return True


def _group_order(group: dict[str, Any]) -> tuple:
    # The group of the base rate first, because NeMo logs the rate of the first group.
    return (
        group["lr_mult"] != 1.0,
        -group["lr_mult"],
        -group["wd_mult"],
        group["is_expert_parallel"],
        group["is_decoupled_lr"],
    )


@patch(
    "lr-mult-per-parameter",
    why="Megatron-Core 0.15 knows one learning-rate multiplier; vision tower, projector, language model and heads each"
    " have their own rate, and 0 must mean 0.",
    until="get_megatron_optimizer takes per-parameter overrides (Megatron-Core 0.16's config_overrides).",
    of={"megatron-core": ("0.15.3",)},
    unneeded={"megatron-core 0.19": "its config_overrides give a rate by a parameter's name"},
)
def lr_mult_per_parameter():
    import megatron.core.optimizer as optimizer_package
    import torch

    one_multiplier = optimizer_package._get_param_groups
    signature = inspect.signature(one_multiplier)

    @functools.wraps(one_multiplier)
    def get_param_groups(*args, **kwargs):
        bound = signature.bind(*args, **kwargs).arguments
        condition = bound["scale_lr_cond"]
        if not isinstance(condition, PerParameter):
            return one_multiplier(*args, **kwargs)
        chunks: list[dict[float, list[tuple[str, Any]]]] = []
        for chunk in bound["model_chunks"]:
            by_multiplier: dict[float, list[tuple[str, Any]]] = {}
            for name, parameter in chunk.named_parameters():
                if parameter.requires_grad:
                    by_multiplier.setdefault(condition(name, parameter), []).append((name, parameter))
            chunks.append(by_multiplier)
        # Every rank makes every group, with or without parameters, in the same order: checkpoints need that.
        everywhere: list[Any] = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(everywhere, sorted({m for chunk in chunks for m in chunk}))
        groups = []
        for multiplier in sorted({m for multipliers in everywhere for m in multipliers}):
            bound["model_chunks"] = [_Only(chunk.get(multiplier, [])) for chunk in chunks]
            bound["scale_lr_cond"], bound["lr_mult"] = _always, multiplier
            groups += one_multiplier(**bound)
        return sorted(groups, key=_group_order)

    yield Change(optimizer_package, "_get_param_groups", get_param_groups)


def _update_lr(self: Any, epoch: int | None = None) -> None:
    from torch.optim.lr_scheduler import LRScheduler

    groups = self.optimizer.param_groups
    multipliers = [group.get("pre_lr_mult", 1.0) for group in groups]
    if all(multiplier == 1.0 for multiplier in multipliers):
        LRScheduler._update_lr(self, epoch)
        return
    scaled = self.base_lrs
    self.base_lrs = [group["pre_mult_lr"] for group in groups]
    try:
        LRScheduler._update_lr(self, epoch)
    finally:
        self.base_lrs = scaled
    for group, multiplier in zip(groups, multipliers, strict=True):
        group["lr"] *= multiplier
    self._last_lr = [group["lr"] for group in groups]


@patch(
    "lr-schedule-per-group",
    why="NeMo's schedulers give every group the same floor min_lr (a group of rate 0 too, and CosineAnnealing raises"
    " where a group's rate is below it).",
    until="NeMo's schedulers scale min_lr by the group's multiplier and keep the rates in the groups.",
    of={"nemo_toolkit": ("2.7.3",)},
)
def lr_schedule_per_group():
    for scheduler in _nemo_schedulers():
        yield Change(scheduler, "_update_lr", _update_lr)


def _nemo_schedulers() -> Iterator[type]:
    import nemo.core.optim.lr_scheduler as nemo_schedulers
    from torch.optim.lr_scheduler import _LRScheduler

    for scheduler in vars(nemo_schedulers).values():
        if inspect.isclass(scheduler) and _LRScheduler in scheduler.__bases__:
            yield scheduler


def _with_common_step(state_dict: Callable[[Any], dict[str, Any]]) -> Callable[[Any], dict[str, Any]]:
    @functools.wraps(state_dict)
    def wrapped(self):
        state = state_dict(self)
        groups = state.get("optimizer", state)["param_groups"]
        steps = {group["step"] for group in groups if "step" in group and len(group["params"]) > 0}
        assert len(steps) <= 1, f"the parameter groups count different steps: {steps}"
        for group in groups:
            for step in steps:
                group["step"] = step
        return state

    return wrapped


@patch(
    "step-of-empty-groups",
    why="FusedAdam counts steps per group and skips groups without a parameter on this rank; a checkpoint without the"
    " distributed optimizer holds rank 0's groups, so a group that is empty there restarts its bias correction.",
    until="FP32Optimizer and Float16OptimizerWithFloat16Params align the steps, as DistributedOptimizer does.",
    of={"megatron-core": ("0.15.3", "0.19")},
)
def step_of_empty_groups():
    from megatron.core.optimizer.optimizer import Float16OptimizerWithFloat16Params, FP32Optimizer

    for cls in (FP32Optimizer, Float16OptimizerWithFloat16Params):
        yield Change(cls, "state_dict", _with_common_step(cls.state_dict))


def _groups_of_this_run(own: list[dict[str, Any]], saved: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The optimizer's own groups, with the one thing that the saved ones know better: how many steps were done."""
    steps = {group["step"] for group in saved if "step" in group}
    assert len(steps) <= 1, f"the checkpoint's parameter groups count different steps: {steps}"
    done = {"step": steps.pop()} if steps else {}
    return [group | done for group in own]


def _without_params(group: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in group.items() if name != "params"}


def _load_sharded(load: Callable[..., Any]) -> Callable[..., Any]:
    """DistributedOptimizer's, whose saved groups come without parameters and are matched by their multipliers."""

    @functools.wraps(load)
    def wrapped(self, state_dict):
        if "optimizer" in state_dict:
            own = [_without_params(group) for group in self.optimizer.param_groups]
            groups = _groups_of_this_run(own, state_dict["optimizer"]["param_groups"])
            state_dict = {**state_dict, "optimizer": {**state_dict["optimizer"], "param_groups": groups}}
        return load(self, state_dict)

    return wrapped


def _load_whole(load: Callable[..., Any]) -> Callable[..., Any]:
    """The other optimizers', whose groups name their parameters by the number they have in this process."""

    @functools.wraps(load)
    def wrapped(self, state_dict):
        inner = state_dict.get("optimizer", state_dict)
        own = self.optimizer.state_dict()["param_groups"]
        inner["param_groups"] = _groups_of_this_run(own, inner["param_groups"])
        return load(self, state_dict)

    return wrapped


def _without_groups(sharded_state_dict: Callable[..., Any]) -> Callable[..., Any]:
    """A checkpoint is read into lists of as many groups as it has, whatever the optimizer has."""

    @functools.wraps(sharded_state_dict)
    def wrapped(self, model_sharded_state_dict, is_loading=False, metadata=None):
        state = sharded_state_dict(self, model_sharded_state_dict, is_loading, metadata)
        if is_loading:
            del state.get("optimizer", state)["param_groups"]
        return state

    return wrapped


@patch(
    "groups-of-this-run",
    why="On resume Megatron takes rate, weight decay, betas and epsilon of every parameter group from the checkpoint,"
    " whatever the run's options say, and fails where no saved group has a group's multiplier of the rate.",
    until="Megatron-Core restores optimizer states without the groups' hyperparameters, on request.",
    of={"megatron-core": ("0.15.3",)},
)
def groups_of_this_run():
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
    from megatron.core.optimizer.optimizer import Float16OptimizerWithFloat16Params, FP32Optimizer

    yield Change(DistributedOptimizer, "load_state_dict", _load_sharded(DistributedOptimizer.load_state_dict))
    for cls in (FP32Optimizer, Float16OptimizerWithFloat16Params):
        yield Change(cls, "load_state_dict", _load_whole(cls.load_state_dict))
        yield Change(cls, "sharded_state_dict", _without_groups(cls.sharded_state_dict))


def _go_on_at(self: Any, state_dict: dict[str, Any]) -> None:
    self._step_count = state_dict["_step_count"]
    self.last_epoch = state_dict["last_epoch"] - 1
    self._update_lr()  # which adds the 1, and sets the groups' rates


@patch(
    "schedule-of-this-run",
    why="On resume NeMo's schedulers take length, warm-up, peak and floor from the checkpoint, whatever the run's"
    " options say: a run that is made longer trains on at the rate with which it had ended.",
    until="NeMo's schedulers load no more than their place in the schedule.",
    of={"nemo_toolkit": ("2.7.3",)},
)
def schedule_of_this_run():
    for scheduler in _nemo_schedulers():
        yield Change(scheduler, "load_state_dict", _go_on_at)


PATCHES = [
    lr_mult_per_parameter,
    lr_schedule_per_group,
    step_of_empty_groups,
    groups_of_this_run,
    schedule_of_this_run,
]


def apply() -> None:
    """Apply the patches of this module; a second call does nothing.

    Raises:
        ValueError: a package has a version that the patches were not written for.
    """
    for each in PATCHES:
        each.apply()


def revert() -> None:
    """Restore what was there before :func:`apply`."""
    for each in reversed(PATCHES):
        each.revert()
