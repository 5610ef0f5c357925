"""Chunks of our own model for a loop of one's own, out of a run's configuration."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core import parallel_state as ps
from torch import nn

from nemo_pre.config.run import RunConfig
from nemo_pre.core.objectives import Objectives
from nemo_pre.neva.build import build_neva_config
from nemo_pre.neva.model import MCoreVisualNevaModel, VisualNevaConfig


def build_chunks(
    run: RunConfig, objectives: Objectives | None = None, config: VisualNevaConfig | None = None
) -> list[MCoreVisualNevaModel]:
    """This rank's chunks, with what the objectives train; Megatron's model-parallel groups must be there.

    Args:
        run: says the model, the layout and the precision.
        objectives: attached to the chunks; None: a model without any.
        config: another model than the run's, such as one of :func:`model_config` with a ``HybridModel`` in it.

    Raises:
        ValueError: the groups are another layout's than the run's, or the model cannot carry an objective.
    """
    _refuse_other_groups(run)
    config = model_config(run) if config is None else config
    if objectives is not None:
        objectives.prepare(config)
    virtual = run.parallel.virtual_pipeline
    chunks = [config.configure_model(vp_stage=stage if virtual else None) for stage in range(virtual or 1)]
    if objectives is not None:
        objectives.attach(chunks)
    return chunks


def model_config(run: RunConfig) -> VisualNevaConfig:
    """The whole model's configuration in the run's layout, for Megatron's schedules, wrappers and optimizers."""
    config = build_neva_config(run, on_gpu=torch.cuda.is_available())
    parallel = run.parallel
    config.tensor_model_parallel_size = parallel.tensor
    config.sequence_parallel = parallel.sequence and parallel.tensor > 1
    config.pipeline_model_parallel_size = parallel.pipeline
    config.virtual_pipeline_model_parallel_size = parallel.virtual_pipeline
    config.context_parallel_size = parallel.context
    if parallel.virtual_pipeline:
        config.microbatch_group_size_per_vp_stage = parallel.pipeline
    if run.precision.name != "fp32":
        for each in (config, config.language_transformer_config, config.vision_projection_config):
            each.bf16, each.params_dtype, each.pipeline_dtype = True, torch.bfloat16, torch.bfloat16
    return config


def wrap(chunks: list[MCoreVisualNevaModel], ddp_config: Any) -> list[nn.Module]:
    """The chunks in Megatron's wrappers for bf16 and for replicas, ready for its schedules."""
    from megatron.core.distributed import DistributedDataParallel, finalize_model_grads
    from megatron.core.transformer.module import Float16Module

    wrapped: list[nn.Module] = []
    for number, chunk in enumerate(chunks):
        inner: Any = Float16Module(chunk.config, chunk) if chunk.config.bf16 else chunk
        # Of several chunks, the later ones' gradients need not come in one bucket early: Megatron's own rule.
        wrapped.append(DistributedDataParallel(chunk.config, ddp_config, inner, disable_bucketing=number > 0))
    shared = chunks[0].config
    shared.finalize_model_grads_func = finalize_model_grads
    if ddp_config.overlap_grad_reduce:  # gradients are reduced in the last micro-batch's backward pass alone
        pauses = [chunk.no_sync for chunk in wrapped]  # type: ignore[attr-defined]
        shared.no_sync_func = pauses if len(pauses) > 1 else pauses[0]
    return wrapped


def _refuse_other_groups(run: RunConfig) -> None:
    parallel = run.parallel
    wanted = {
        "parallel.tensor": (parallel.tensor, ps.get_tensor_model_parallel_world_size()),
        "parallel.pipeline": (parallel.pipeline, ps.get_pipeline_model_parallel_world_size()),
        "parallel.context": (parallel.context, ps.get_context_parallel_world_size()),
        "parallel.data": (parallel.data, ps.get_data_parallel_world_size()),
    }
    for option, (size, there) in wanted.items():
        if size != there:
            raise ValueError(
                f"{option}={size}, and Megatron's groups were made for {there}: make them for the run's layout, or "
                f"set {option}={there}."
            )
