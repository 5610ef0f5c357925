"""On one process: ranks of large layouts, built without memory."""

from __future__ import annotations

from nemo_pre.config.run import RunConfig


def parameters_of_stages(config: RunConfig, stages: list[int]) -> list[dict[str, int]]:
    """Parameters by the model's own parts, of the first rank of each of these pipeline stages.

    The process takes a rank's place in a job of ``fake`` process groups; weights are on the meta device.
    """
    from nemo_pre.compat import cpu_backend

    cpu_backend.apply()
    return [_parameters(config, stage) for stage in stages]


def _parameters(config: RunConfig, stage: int) -> dict[str, int]:
    import torch
    import torch.distributed as dist
    from megatron.core import parallel_state as ps
    from torch.testing._internal.distributed.fake_pg import FakeStore

    from nemo_pre.config.derived import world_size

    layout = config.parallel
    world = world_size(layout)
    dist.init_process_group("fake", store=FakeStore(), rank=stage * (world // layout.pipeline), world_size=world)
    ps.initialize_model_parallel(
        layout.tensor,
        layout.pipeline,
        layout.virtual_pipeline,
        context_parallel_size=layout.context,
        create_gloo_process_groups=False,
    )
    found: dict[str, int] = {}
    try:
        with torch.device("meta"):
            for chunk in _chunks(config):
                for name, parameter in chunk.named_parameters():
                    names = name.split(".")
                    part = names[1] if names[0] == "language_model" else names[0]
                    found[part] = found.get(part, 0) + parameter.numel()
    finally:
        ps.destroy_model_parallel()
        dist.destroy_process_group()
    return found


def _chunks(config: RunConfig) -> list:  # type: ignore[type-arg]
    """What the trainer's strategy and callbacks would build."""
    from nemo_pre.neva.build import build_neva_config
    from nemo_pre.objectives.registry import enabled

    layout = config.parallel
    neva = build_neva_config(config, on_gpu=False)
    neva.tensor_model_parallel_size = layout.tensor
    neva.pipeline_model_parallel_size = layout.pipeline
    neva.virtual_pipeline_model_parallel_size = layout.virtual_pipeline
    neva.context_parallel_size = layout.context
    neva.sequence_parallel = layout.sequence and layout.tensor > 1
    for objective in enabled(config):
        objective.build_term().prepare(neva)
    if layout.virtual_pipeline is None:
        return [neva.configure_model()]
    return [neva.configure_model(vp_stage=chunk) for chunk in range(layout.virtual_pipeline)]
