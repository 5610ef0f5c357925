"""A training run on one rank: build, restore, fit. Started on every rank by :mod:`nemo_pre.launch`."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

from nemo_pre.config.derived import world_size
from nemo_pre.config.schema import RunConfig


def run_rank(config: RunConfig) -> None:
    """Train on this rank. Expects RANK, WORLD_SIZE and MASTER_ADDR in the environment."""
    on_gpu = prepare_process(config)
    from nemo_pre.callbacks.checkpoint import newest_checkpoint
    from nemo_pre.data.module import build_data_module

    trainer = build_trainer(config, on_gpu)
    model = build_model(config, on_gpu)
    data = build_data_module(config)
    trainer.fit(model, data, ckpt_path=newest_checkpoint(config) if config.resume else None)


def prepare_process(config: RunConfig) -> bool:
    """Apply the patches this run needs; returns whether it runs on a GPU. Once per process, before building."""
    from nemo_pre.compat import cpu_backend, learning_rates, telemetry

    on_gpu = not cpu_backend.use_cpu(config.platform)
    if not on_gpu:
        cpu_backend.apply()
    learning_rates.apply()
    telemetry.apply()
    return on_gpu


def build_model(config: RunConfig, on_gpu: bool) -> Any:
    """The Lightning module, with its optimizer; weights are created when the trainer sets it up."""
    from nemo_pre.neva.build import build_neva_config
    from nemo_pre.neva.model import VisualNevaModel
    from nemo_pre.optim import build_optimizer

    return VisualNevaModel(build_neva_config(config, on_gpu), optim=build_optimizer(config), tokenizer=None)


def build_trainer(config: RunConfig, on_gpu: bool, callbacks: list[Any] | None = None) -> Any:
    """The NeMo trainer for the run's layout, with the run's callbacks (or those given instead)."""
    from nemo import lightning as nl

    nodes = config.cluster.nodes
    precision = {"fp32": "32", "bf16": "bf16-mixed"}[config.precision.name]
    return nl.Trainer(
        accelerator="gpu" if on_gpu else "cpu",
        devices=world_size(config.parallel) // nodes,
        num_nodes=nodes,
        strategy=build_strategy(config, on_gpu),
        plugins=nl.MegatronMixedPrecision(precision=precision),
        callbacks=run_callbacks(config) if callbacks is None else callbacks,
        logger=run_loggers(config) if callbacks is None else False,
        max_steps=config.trainer.max_steps,
        log_every_n_steps=config.trainer.log_every,
        val_check_interval=config.trainer.val_every or config.trainer.max_steps,
        check_val_every_n_epoch=None,
        limit_val_batches=0,
        num_sanity_val_steps=0,
        enable_progress_bar=False,  # NeMo's enters a collective on rank 0 alone; ProgressCallback reports instead
        enable_model_summary=False,
        enable_checkpointing=True,
        use_distributed_sampler=False,
        default_root_dir=config.output_dir,
    )


def build_strategy(config: RunConfig, on_gpu: bool) -> Any:
    import torch
    from megatron.core.dist_checkpointing.validation import StrictHandling
    from megatron.core.distributed import DistributedDataParallelConfig
    from nemo import lightning as nl

    from nemo_pre.callbacks.checkpoint import newest_checkpoint

    layout = config.parallel
    restore = None
    if config.init_from and not (config.resume and newest_checkpoint(config)):
        restore = nl.RestoreConfig(path=config.init_from, load_model_state=True, load_optim_state=False)
    return nl.MegatronStrategy(
        tensor_model_parallel_size=layout.tensor,
        pipeline_model_parallel_size=layout.pipeline,
        virtual_pipeline_model_parallel_size=layout.virtual_pipeline,
        context_parallel_size=layout.context,
        sequence_parallel=layout.sequence and layout.tensor > 1,
        pipeline_dtype=torch.float32 if config.precision.name == "fp32" else torch.bfloat16,
        ddp=DistributedDataParallelConfig(
            use_distributed_optimizer=layout.distributed_optimizer,
            overlap_grad_reduce=layout.overlap_grad_reduce,
            check_for_nan_in_grad=True,
        ),
        process_group_backend="nccl" if on_gpu else "gloo",
        timeout=timedelta(seconds=config.trainer.rank_timeout),
        ckpt_async_save=config.trainer.async_checkpoint,
        ckpt_optim_fully_reshardable=layout.distributed_optimizer,
        ckpt_load_strictness=StrictHandling.LOG_ALL,
        restore_config=restore,
    )


def objective_callbacks(config: RunConfig) -> list[Any]:
    """The callbacks that decide what is optimised."""
    from nemo_pre.callbacks.step_planner import StepPlanner

    callbacks: list[Any] = [StepPlanner()]
    if config.objective.pre.enabled:
        from nemo_pre.callbacks.pre import PReCallback

        callbacks.append(PReCallback(config.objective.pre, seed=config.seed))
    return callbacks


def run_callbacks(config: RunConfig) -> list[Any]:
    """Everything a run does beside computing gradients, in order."""
    from nemo_pre.callbacks.checkpoint import RunCheckpoint
    from nemo_pre.callbacks.metrics import MetricsCallback
    from nemo_pre.callbacks.progress import ProgressCallback

    log_every, batch_size = config.trainer.log_every, config.trainer.global_batch_size
    callbacks = objective_callbacks(config)
    callbacks.append(ProgressCallback(log_every, batch_size))
    callbacks.append(MetricsCallback(config.output_dir, log_every, batch_size))
    if config.trainer.val_samples > 0:
        from nemo_pre.callbacks.exact_match import ExactMatchCallback

        callbacks.append(ExactMatchCallback(config))
    return [*callbacks, RunCheckpoint(config)]


def run_loggers(config: RunConfig) -> Any:
    """TensorBoard; metrics.jsonl is written by a callback, which knows what a resume repeats."""
    from nemo_pre.callbacks.metrics import RunTensorBoard

    return RunTensorBoard(config.output_dir)
