"""Megatron's own optimizer and schedule for a run's options, with a learning rate by module; from 0.19 on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from nemo_pre.compat import versions
from nemo_pre.config.module_rates import rates
from nemo_pre.config.run import RunConfig
from nemo_pre.config.schema import OptimConfig
from nemo_pre.whole_numbers import part_nearest

WRAPPERS = ("", "module.", "module.module.")  # what DDP and the wrapper for bf16 put before a parameter's name


def build_optimizer(run: RunConfig, model: Sequence[nn.Module]) -> tuple[Any, Any]:
    """Megatron's AdamW for the run's options, and its cosine schedule: ``scheduler.step(1)`` after every step.

    Args:
        run: says the rates, the schedule and the precision.
        model: the rank's chunks in Megatron's wrappers.

    Raises:
        ValueError: Megatron-Core is older than 0.19.
    """
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
    from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

    optim, steps = run.optim, run.trainer.max_steps
    config = OptimizerConfig(
        optimizer="adam",
        lr=optim.lr,
        min_lr=optim.lr * optim.min_lr_ratio,
        weight_decay=optim.weight_decay,
        adam_beta1=optim.beta1,
        adam_beta2=optim.beta2,
        adam_eps=optim.eps,
        clip_grad=optim.clip_grad,
        bf16=run.precision.name != "fp32",
        use_distributed_optimizer=run.parallel.distributed_optimizer,
    )
    optimizer = get_megatron_optimizer(config, list(model), config_overrides=rate_overrides(optim, config))
    warmup = part_nearest(optim.warmup_ratio, steps)
    scheduler = OptimizerParamScheduler(
        optimizer,
        init_lr=optim.lr / (warmup + 1),  # the first step's, as NeMo's schedule has it
        max_lr=optim.lr,
        min_lr=config.min_lr,
        lr_warmup_steps=warmup,
        lr_decay_steps=steps,
        lr_decay_style="cosine",
        start_wd=optim.weight_decay,
        end_wd=optim.weight_decay,
        wd_incr_steps=steps,
        wd_incr_style="constant",
    )
    return optimizer, scheduler


def rate_overrides(optim: OptimConfig, config: Any) -> dict[Any, Any]:
    """What ``get_megatron_optimizer(config, chunks, config_overrides=...)`` is given, so that every module has the
    peak rate that ``optim.lr_vision`` and its like say, and falls to the same part of it.

    Args:
        optim: of a run's configuration.
        config: Megatron's ``OptimizerConfig``, whose own overrides (no weight decay of biases and norms) come first.

    Raises:
        ValueError: Megatron-Core is older and has no overrides.
    """
    try:
        from megatron.core.optimizer import get_standard_config_overrides
        from megatron.core.optimizer.optimizer_config import ParamKey
        from megatron.core.optimizer_param_scheduler import ParamGroupOverride
    except ImportError:
        raise ValueError(
            f"megatron-core {versions.installed('megatron-core')} has no config_overrides for a rate by module: "
            f"install 0.19 (the extra core)."
        ) from None
    found: dict[Any, Any] = dict(get_standard_config_overrides(config))
    for prefix, rate in rates(optim).items():
        if rate != optim.lr:
            key = ParamKey(name=tuple(f"{wrapper}{prefix}*" for wrapper in WRAPPERS))
            found[key] = ParamGroupOverride(max_lr=rate, min_lr=rate * optim.min_lr_ratio)
    return found
