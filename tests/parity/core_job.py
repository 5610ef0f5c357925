"""The rank's side of a parity test on plain Megatron-Core: the loop that a user of ``nemo_pre.core`` writes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from tests.parity import foreign
from tests.parity.job import Job, StepRecord, gradients_times, load_weights, masks_of, run_of, width_of_stored_targets

# By the kind of model, a weight's name there for the oracle's, and back.
NAMES: dict[str, tuple[Callable[[str], str], Callable[[str], str]]] = {
    "own": (str, str),
    "hybrid": (foreign.hybrid_name, foreign.oracle_name),
    "llava": (foreign.llava_name, lambda name: name.replace("vision_model.tower.", "vision_model.")),
}


def train(job: Job) -> list[StepRecord]:
    """On a rank: run ``job``; returns what each step gave."""
    from nemo_pre.compat import cpu_backend

    cpu_backend.apply()
    import torch
    from megatron.core import parallel_state as ps
    from megatron.core.distributed import DistributedDataParallelConfig
    from megatron.core.pipeline_parallel import get_forward_backward_func

    from nemo_pre.config.derived import overlaps_grad_reduce
    from nemo_pre.core import Objectives, build_chunks, build_optimizer, forward_step
    from nemo_pre.core.model import model_config, wrap
    from nemo_pre.core.steps import language_loss
    from tests.ranks.sharded import weight_shards

    assert job.objective is None, "a NeMo callback"
    run = run_of(job)
    start_ranks(run)
    objectives, config = Objectives.of_run(run), model_config(run)
    for name, value in job.settings.items():
        for each in (config, config.language_transformer_config):
            assert hasattr(each, name), name
            setattr(each, name, value)
    theirs, ours = NAMES[job.model_kind]
    records: list[StepRecord] = []
    with gradients_times(job.gradient_factor), width_of_stored_targets():
        chunks: list[Any]
        if job.model_kind == "llava":
            chunks = foreign.llava_chunks(config, run)
            objectives.attach(chunks, encoder_width=run.model.vision.hidden_size)
        else:
            config = foreign.hybrid_config(config, run) if job.model_kind == "hybrid" else config
            chunks = build_chunks(run, objectives, config)
        ddp = DistributedDataParallelConfig(
            use_distributed_optimizer=run.parallel.distributed_optimizer,
            # LLaVAModel leaves its encoder out of the graph where there is no image, which reductions would wait for.
            overlap_grad_reduce=overlaps_grad_reduce(run.parallel) and job.model_kind != "llava",
            bucket_size=job.bucket_size,
        )
        model = wrap(chunks, ddp)
        objectives.install()
        optimizer, scheduler = build_optimizer(run, model) if job.trains else (None, None)
        schedule = get_forward_backward_func()
        for step in job.steps:
            if not (job.trains and records):
                load_weights(replace(job, state={theirs(name): value for name, value in job.state.items()}), chunks)
                if optimizer is not None:
                    optimizer.reload_model_params()
            for wrapped in model:
                wrapped.zero_grad_buffer()
            if optimizer is not None:
                optimizer.zero_grad()
            batches = objectives.start_step(step[ps.get_data_parallel_rank()])
            reported = schedule(
                forward_step_func=foreign.llava_forward_step if job.model_kind == "llava" else forward_step,
                data_iterator=[iter(batches) for _ in model] if len(model) > 1 else iter(batches),
                model=model if len(model) > 1 else model[0],
                num_microbatches=len(batches),
                seq_length=objectives.sequence_length,
                micro_batch_size=len(batches[0]["tokens"]),
                forward_only=False,
            )
            metrics = {**objectives.end_step(), "reduced_train_loss": language_loss(reported)}
            gradients = [replace(shard, name=ours(shard.name)) for shard in final_gradients(model, chunks)]
            records.append(StepRecord(metrics, gradients, masks_of(batches)))
            if optimizer is not None:
                optimizer.step()
                scheduler.step(1)
                records[-1].weights = weight_shards(chunks)
            objectives.after_update()
    torch.distributed.barrier()
    return records


def start_ranks(run: Any) -> None:
    """Megatron's groups and random states of the run's layout."""
    import torch
    from megatron.core import parallel_state as ps
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    parallel = run.parallel
    torch.distributed.init_process_group("gloo")
    ps.initialize_model_parallel(
        tensor_model_parallel_size=parallel.tensor,
        pipeline_model_parallel_size=parallel.pipeline,
        virtual_pipeline_model_parallel_size=parallel.virtual_pipeline,
        context_parallel_size=parallel.context,
        create_gloo_process_groups=True,
    )
    torch.manual_seed(run.seed)
    model_parallel_cuda_manual_seed(run.seed + 100 * ps.get_pipeline_model_parallel_rank())


def final_gradients(model: list[Any], chunks: list[Any]) -> list[Any]:
    from tests.ranks.sharded import gather_gradients, gradient_shards

    gather_gradients(model)
    return gradient_shards(chunks)
