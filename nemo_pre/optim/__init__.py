"""The optimizer: Megatron's AdamW with a cosine schedule and a learning rate per module."""

from __future__ import annotations

from typing import Any

from nemo_pre.config.module_rates import learning_rate
from nemo_pre.config.run import RunConfig
from nemo_pre.whole_numbers import part_nearest


def build_optimizer(config: RunConfig) -> Any:
    """NeMo's optimizer module for the run. Needs :func:`nemo_pre.compat.learning_rates.apply`."""
    from megatron.core.optimizer import OptimizerConfig
    from nemo import lightning as nl

    from nemo_pre.compat import learning_rates
    from nemo_pre.optim.finite import FiniteOptimizerModule

    optim = config.optim
    min_lr = optim.lr * optim.min_lr_ratio
    # A roll-back judges the step when it is done.
    stops = config.trainer.nan_action == "stop"
    module = FiniteOptimizerModule if stops else nl.MegatronOptimizerModule
    return module(
        config=OptimizerConfig(
            optimizer="adam",
            lr=optim.lr,
            min_lr=min_lr,
            weight_decay=optim.weight_decay,
            adam_beta1=optim.beta1,
            adam_beta2=optim.beta2,
            adam_eps=optim.eps,
            clip_grad=optim.clip_grad,
            bf16=config.precision.name != "fp32",
            use_distributed_optimizer=config.parallel.distributed_optimizer,
        ),
        lr_scheduler=nl.lr_scheduler.CosineAnnealingScheduler(
            max_steps=config.trainer.max_steps,
            warmup_steps=part_nearest(optim.warmup_ratio, config.trainer.max_steps),
            constant_steps=0,
            min_lr=min_lr,
        ),
        scale_lr_cond=learning_rates.PerParameter(lambda name, _: learning_rate(name, optim) / optim.lr),
    )
