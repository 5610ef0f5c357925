"""A training run on one rank: build, restore, fit. Started on every rank by :mod:`nemo_pre.launch.ranks`."""

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING, Any

from nemo_pre.config.derived import overlaps_grad_reduce, world_size
from nemo_pre.config.run import RunConfig

if TYPE_CHECKING:
    from nemo_pre.callbacks.resume import StartPoint


def run_rank(config: RunConfig) -> None:
    """Train on this rank. Expects RANK, WORLD_SIZE and MASTER_ADDR in the environment."""
    on_gpu = prepare_process(config)
    from nemo_pre.callbacks.resume import start_point
    from nemo_pre.nemo.data import build_data_module

    start = start_point(config, training_only_parameters(config))
    data = build_data_module(config)
    trainer = build_trainer(config, on_gpu, weights_from=start.weights_from)
    trainer.fit(build_model(config, on_gpu, _encoder(config, start)), data, ckpt_path=start.resume_from)
    if trainer.is_global_zero:
        from nemo_pre.plots import plot_run

        plot_run(config.output_dir)


def prepare_process(config: RunConfig) -> bool:
    """Apply the patches this run needs; returns whether it runs on a GPU. Once per process, before building."""
    from nemo_pre.compat import (
        checkpoints,
        cpu_backend,
        distributed_setup,
        learning_rates,
        progress,
        safe_reading,
        telemetry,
    )

    on_gpu = not cpu_backend.use_cpu(config.platform)
    if not on_gpu:
        cpu_backend.apply()
    for patches in (checkpoints, safe_reading, learning_rates, progress, telemetry):
        patches.apply()
    distributed_setup.apply(config.seed, timedelta(seconds=config.trainer.rank_timeout))

    from nemo.utils import logging

    logging.set_verbosity(logging.WARNING)  # NeMo tells of every process group and module at INFO
    return on_gpu


def _encoder(config: RunConfig, start: StartPoint) -> str | None:
    """The directory of the tower that the encoder starts as; None where its weights are random or a checkpoint's."""
    if config.vision_from is None or start.resume_from is not None or start.weights_from is not None:
        return None
    from nemo_pre.huggingface.start_tower import tower_directory

    return str(tower_directory(config.vision_from))


def build_model(config: RunConfig, on_gpu: bool, encoder: str | None = None) -> Any:
    """The Lightning module, with its optimizer; weights are created when the trainer sets it up.

    Args:
        encoder: directory of the vision tower that the model's starts as; None: random weights, or those that are
            loaded then.
    """
    from nemo_pre.nemo.module import VisualNevaModel
    from nemo_pre.neva.build import build_neva_config
    from nemo_pre.optim import build_optimizer

    return VisualNevaModel(build_neva_config(config, on_gpu, encoder), optim=build_optimizer(config), tokenizer=None)


def build_trainer(
    config: RunConfig, on_gpu: bool, callbacks: list[Any] | None = None, weights_from: str | None = None
) -> Any:
    """The NeMo trainer for the run's layout.

    Args:
        callbacks: instead of the run's own; loggers are then left out too.
        weights_from: checkpoint whose weights the model starts with.
    """
    from nemo import lightning as nl

    nodes = config.cluster.nodes
    precision = "32" if config.precision.name == "fp32" else "bf16-mixed"
    return nl.Trainer(
        accelerator="gpu" if on_gpu else "cpu",
        devices=world_size(config.parallel) // nodes,
        num_nodes=nodes,
        strategy=build_strategy(config, on_gpu, weights_from),
        plugins=nl.MegatronMixedPrecision(precision=precision),
        callbacks=run_callbacks(config) if callbacks is None else callbacks,
        logger=run_loggers(config) if callbacks is None else False,
        max_steps=config.trainer.max_steps,
        log_every_n_steps=config.trainer.log_every,
        limit_val_batches=0,  # ExactMatchCallback validates
        num_sanity_val_steps=0,
        enable_progress_bar=False,  # NeMo's enters a collective on rank 0 alone; ProgressCallback reports instead
        enable_model_summary=False,
        enable_checkpointing=callbacks is None,  # the run's own callback saves; without it Lightning would add one
        use_distributed_sampler=False,
        default_root_dir=config.output_dir,
    )


def build_strategy(config: RunConfig, on_gpu: bool, weights_from: str | None = None) -> Any:
    import torch
    from megatron.core.dist_checkpointing.validation import StrictHandling
    from megatron.core.distributed import DistributedDataParallelConfig
    from nemo import lightning as nl

    layout = config.parallel
    restore = None
    if weights_from is not None:
        restore = nl.RestoreConfig(path=weights_from, load_model_state=True, load_optim_state=False)
    return nl.MegatronStrategy(
        tensor_model_parallel_size=layout.tensor,
        pipeline_model_parallel_size=layout.pipeline,
        virtual_pipeline_model_parallel_size=layout.virtual_pipeline,
        context_parallel_size=layout.context,
        sequence_parallel=layout.sequence and layout.tensor > 1,
        pipeline_dtype=torch.float32 if config.precision.name == "fp32" else torch.bfloat16,
        ddp=DistributedDataParallelConfig(
            use_distributed_optimizer=layout.distributed_optimizer,
            overlap_grad_reduce=overlaps_grad_reduce(layout),
            check_for_nan_in_grad=False,  # nemo_pre.optim.finite looks, once a step
        ),
        process_group_backend="nccl" if on_gpu else "gloo",
        ckpt_async_save=config.trainer.async_checkpoint,
        ckpt_optim_fully_reshardable=layout.distributed_optimizer,
        # Parts that only training has may differ, which start_point says; it has checked that the model is all there.
        ckpt_load_strictness=StrictHandling.LOG_ALL,
        restore_config=restore,
    )


def training_only_parameters(config: RunConfig) -> dict[str, tuple[int, ...]]:
    """Names and shapes of what the enabled objectives add to the model: training has it and inference drops it."""
    import torch

    from nemo_pre.neva.build import build_neva_config
    from nemo_pre.objectives.registry import enabled

    terms = [objective.build_term() for objective in enabled(config)]
    if not terms:
        return {}
    neva = build_neva_config(config, on_gpu=False)
    shapes: dict[str, tuple[int, ...]] = {}
    with torch.device("meta"):
        for term in terms:
            term.prepare(neva)
        for part in neva.parts.values():
            for name, value in part.parts().items():
                inside = {name: value} if isinstance(value, torch.Tensor) else dict(value.named_parameters(name))
                shapes |= {full: tuple(parameter.shape) for full, parameter in inside.items()}
    return shapes


def objective_callbacks(config: RunConfig) -> list[Any]:
    """The callbacks that decide what is optimised."""
    from nemo_pre.callbacks.step_planning import StepPlanning
    from nemo_pre.callbacks.term_callback import TermCallback
    from nemo_pre.objectives.registry import enabled

    terms = [TermCallback(objective.build_term()) for objective in enabled(config)]
    return [StepPlanning(config.objective.lm_weight), *terms]


def run_callbacks(config: RunConfig) -> list[Any]:
    """Everything a run does beside computing gradients, in order."""
    from nemo_pre.callbacks.checkpoint import RunCheckpoint
    from nemo_pre.callbacks.metrics import MetricsCallback
    from nemo_pre.callbacks.preemption import HangWatchdog, NotANumberGuard, PreemptionCallback
    from nemo_pre.callbacks.progress import ProgressCallback
    from nemo_pre.callbacks.run_record import RunRecord

    log_every, batch_size = config.trainer.log_every, config.trainer.global_batch_size
    callbacks = objective_callbacks(config)
    if config.trainer.log_grad_norms_every:
        from nemo_pre.callbacks.gradient_norms import GradientNormsCallback

        callbacks.append(GradientNormsCallback(config.trainer.log_grad_norms_every))
    if config.trainer.log_similarity_every:
        from nemo_pre.callbacks.similarity import VisualSimilarityCallback

        callbacks.append(VisualSimilarityCallback(config.trainer.log_similarity_every))
    callbacks.append(ProgressCallback(log_every, batch_size))
    callbacks += [MetricsCallback(config.output_dir, log_every, batch_size), RunRecord(config)]
    if config.data.record_samples:
        from nemo_pre.callbacks.sample_record import SampleRecord

        callbacks.append(SampleRecord(config.output_dir))
    if config.trainer.val_samples > 0:
        from nemo_pre.callbacks.exact_match import ExactMatchCallback

        callbacks.append(ExactMatchCallback(config))
    if config.trainer.log_diagnostics_every:
        from nemo_pre.callbacks.diagnostics import DiagnosticsCallback

        callbacks.append(DiagnosticsCallback(config))
    if (config.trainer.nan_action, config.trainer.spike_action) != ("stop", "none"):
        from nemo_pre.callbacks.loss_guard import LossGuard

        callbacks.append(LossGuard(config))
    callbacks += [NotANumberGuard(), HangWatchdog(config.trainer.hang_timeout), PreemptionCallback()]
    return [*callbacks, RunCheckpoint(config)]


def run_loggers(config: RunConfig) -> list[Any]:
    """TensorBoard, and W&B if asked; metrics.jsonl is written by a callback, which knows what a resume repeats."""
    from nemo_pre.callbacks.metrics import RunTensorBoard, RunWandb

    asked = [RunWandb(config)] if config.trainer.wandb_project else []
    return [RunTensorBoard(config.output_dir), *asked]
