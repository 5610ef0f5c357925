"""The optimizer: Megatron's AdamW with a cosine schedule and a learning rate per module."""

from __future__ import annotations

from typing import Any

from nemo_pre.config.schema import RunConfig


def build_optimizer(config: RunConfig) -> Any:
    """NeMo's optimizer module for the run."""
    from megatron.core.optimizer import OptimizerConfig
    from nemo import lightning as nl

    optim = config.optim
    base = optim.lr
    return nl.MegatronOptimizerModule(
        config=OptimizerConfig(
            optimizer="adam",
            lr=base,
            min_lr=base * optim.min_lr_ratio,
            weight_decay=optim.weight_decay,
            adam_beta1=optim.beta1,
            adam_beta2=optim.beta2,
            adam_eps=optim.eps,
            clip_grad=optim.clip_grad,
            bf16=config.precision.name == "bf16",
            use_distributed_optimizer=config.parallel.distributed_optimizer,
        ),
        lr_scheduler=nl.lr_scheduler.CosineAnnealingScheduler(
            max_steps=config.trainer.max_steps,
            warmup_steps=round(optim.warmup_ratio * config.trainer.max_steps),
            constant_steps=0,
            min_lr=base * optim.min_lr_ratio,
        ),
    )
