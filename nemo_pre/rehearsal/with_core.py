"""A rehearsed rank's training on plain Megatron-Core: the loop of examples/megatron_core.py on synthetic batches."""

from __future__ import annotations

from datetime import timedelta
from itertools import islice

import torch
from megatron.core import parallel_state as ps
from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

from nemo_pre import core
from nemo_pre.config.derived import overlaps_grad_reduce
from nemo_pre.config.run import RunConfig
from nemo_pre.core.model import model_config, wrap
from nemo_pre.core.steps import language_loss
from nemo_pre.rehearsal.batches import steps
from nemo_pre.rehearsal.found import Order
from nemo_pre.rehearsal.watch import Watch


def train(order: Order, watch: Watch) -> None:
    """Train the rank's steps on synthetic batches."""
    run, layout = order.config, order.config.parallel
    _start_ranks(run)
    watch.progress("building")
    objectives = core.Objectives.of_run(run)
    config = model_config(run)
    for each in (config, config.language_transformer_config, config.vision_projection_config):
        each.use_cpu_initialization = False  # Transformer Engine's layers are made on the GPU
        each.perform_initialization = False
    chunks = core.build_chunks(run, objectives, config)
    for chunk in chunks:
        chunk.to(torch.cuda.current_device())
    ddp = DistributedDataParallelConfig(
        use_distributed_optimizer=layout.distributed_optimizer,
        overlap_grad_reduce=overlaps_grad_reduce(layout),
        grad_reduce_in_fp32=True,
    )
    models = wrap(chunks, ddp)
    objectives.install()
    optimizer, scheduler = core.build_optimizer(run, models)
    loader, schedule = steps(run, order.micro_batches, order.place.data), get_forward_backward_func()
    watch.start(chunks)
    for number in range(1, run.trainer.max_steps + 1):
        watch.begin(number)
        for model in models:
            model.zero_grad_buffer()
        optimizer.zero_grad()
        batches = objectives.start_step(list(islice(loader, order.micro_batches)))
        reported = schedule(
            forward_step_func=core.forward_step,
            data_iterator=[iter(batches) for _ in models] if len(models) > 1 else iter(batches),
            model=models if len(models) > 1 else models[0],
            num_microbatches=order.micro_batches,
            seq_length=objectives.sequence_length,
            micro_batch_size=run.trainer.micro_batch_size,
            forward_only=False,
        )
        watch.before_update()
        language_loss(reported)
        objectives.end_step()
        optimizer.step()
        scheduler.step(1)
        objectives.after_update()
        del batches, reported
        watch.after_step(models, [optimizer])
    objectives.finish()
    watch.end()


def _start_ranks(run: RunConfig) -> None:
    """The process groups and random states of the run's layout."""
    layout, timeout = run.parallel, timedelta(seconds=run.trainer.rank_timeout)
    torch.distributed.init_process_group("nccl", timeout=timeout)
    ps.initialize_model_parallel(
        tensor_model_parallel_size=layout.tensor,
        pipeline_model_parallel_size=layout.pipeline,
        virtual_pipeline_model_parallel_size=layout.virtual_pipeline,
        context_parallel_size=layout.context,
    )
    torch.manual_seed(run.seed)
    model_parallel_cuda_manual_seed(run.seed + 100 * ps.get_pipeline_model_parallel_rank())
