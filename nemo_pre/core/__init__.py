"""The objectives in a Megatron-Core loop of one's own, without NeMo and Lightning; see docs/megatron-core.md.

    objectives = Objectives(compose_run(["experiment=digits_tiny_pre"]).objective, seed=1, max_steps=800)
    objectives.attach(chunks)                     # heads are there before DDP is built
    model = [DistributedDataParallel(config, ddp_config, chunk) for chunk in chunks]
    objectives.install()                          # the initial weights are there
    for _ in range(800):
        batches = objectives.start_step(next_batches())
        forward_backward(..., num_microbatches=len(batches), seq_length=objectives.sequence_length)
        metrics = objectives.end_step()
        optimizer.step()
        objectives.after_update()

``Objectives`` is what every loop needs. The rest is for our own chunks: ``build_chunks`` makes them of a run's
configuration, ``forward_step`` runs one, ``rate_overrides`` gives Megatron's optimizer a rate by module, and
``save_checkpoint`` and ``load_checkpoint`` keep them in the format that ``nemo-pre export`` reads.
"""

from typing import Any

__all__ = [
    "Objectives",
    "build_optimizer",
    "build_chunks",
    "forward_step",
    "load_checkpoint",
    "rate_overrides",
    "save_checkpoint",
]

_WHERE = {
    "Objectives": "objectives",
    "build_chunks": "model",
    "build_optimizer": "optimizer",
    "forward_step": "steps",
    "load_checkpoint": "checkpoint",
    "rate_overrides": "optimizer",
    "save_checkpoint": "checkpoint",
}


def __getattr__(name: str) -> Any:
    # Imported on first use: Megatron takes its time, and a patch of its import may have to come first.
    import importlib

    if name not in _WHERE:
        raise AttributeError(f"module 'nemo_pre.core' has no attribute '{name}'")
    return getattr(importlib.import_module(f"nemo_pre.core.{_WHERE[name]}"), name)
