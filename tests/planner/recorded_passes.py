"""On a rank: the passes that Megatron's own schedule runs in a step, in order, with their times."""

from __future__ import annotations

import time
from typing import Any

from nemo_pre.config.run import RunConfig
from nemo_pre.planner.schedule import Pass


def record_passes(config: RunConfig) -> list[tuple[Pass, float]]:
    """Of the run's last step: every pass of this stage and its seconds."""
    from nemo_pre.compat import cpu_backend

    cpu_backend.apply()
    from megatron.core.pipeline_parallel import schedules

    from nemo_pre.train import build_model, build_trainer, objective_callbacks
    from tests.planner.measured import build_data

    passes: list[tuple[Pass, float]] = []
    chunk_of: dict[int, tuple[int, int]] = {}  # output of a forward pass -> chunk, micro-batch
    forward_step, backward_step = schedules.forward_step, schedules.backward_step

    def forward(*arguments: Any, **options: Any) -> Any:
        start = time.perf_counter()
        output = forward_step(*arguments, **options)
        where = (options.get("vp_stage") or 0, options["current_microbatch"])
        chunk_of[id(output[0])] = where
        passes.append((Pass("F", *where), time.perf_counter() - start))
        return output

    def backward(input_tensor: Any, output_tensor: Any, *arguments: Any) -> Any:
        start = time.perf_counter()
        found = backward_step(input_tensor, output_tensor, *arguments)
        passes.append((Pass("B", *chunk_of.pop(id(output_tensor))), time.perf_counter() - start))
        return found

    schedules.forward_step, schedules.backward_step = forward, backward
    try:
        trainer = build_trainer(config, on_gpu=False, callbacks=objective_callbacks(config))
        trainer.fit(build_model(config, on_gpu=False), build_data(config, images_per_row=1))
    finally:
        schedules.forward_step, schedules.backward_step = forward_step, backward_step
    return passes[-len(passes) // config.trainer.max_steps :]
