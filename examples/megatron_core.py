"""A training loop on Megatron-Core with the objectives of nemo-pre: neither Lightning nor NeMo is imported.

    nemo-pre data demo
    torchrun --nproc-per-node 2 examples/megatron_core.py experiment=digits_tiny_pre trainer.max_steps=40
    torchrun --nproc-per-node 2 examples/megatron_core.py experiment=digits_tiny_pre parallel=tp2_sp OPTIONS
    python examples/megatron_core.py experiment=digits_tiny_pre parallel=single trainer.max_steps=60
    nemo-pre export runs/digits_tiny_pre HF_DIR

The words are those of ``nemo-pre train``. It continues from the newest checkpoint in the run's folder, at any layout.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from datetime import timedelta
from itertools import islice
from typing import Any

from nemo_pre.checks.run import check_options
from nemo_pre.compat import cpu_backend
from nemo_pre.config.compose import compose_run
from nemo_pre.config.run import RunConfig


def train(run: RunConfig) -> dict[str, float]:
    """Train on this rank, from the newest checkpoint on; returns the last step's metrics."""
    on_cpu = cpu_backend.use_cpu(run.platform)
    if on_cpu:
        cpu_backend.apply()  # before Megatron is imported
    import torch
    from megatron.core.distributed import DistributedDataParallelConfig
    from megatron.core.pipeline_parallel import get_forward_backward_func

    from nemo_pre import core
    from nemo_pre.core.model import wrap
    from nemo_pre.core.steps import language_loss
    from nemo_pre.run_files.checkpoints import checkpoint_dir, newest_checkpoint

    start_ranks(run, on_cpu)
    objectives = core.Objectives.of_run(run)
    chunks = core.build_chunks(run, objectives)  # with heads, before they are wrapped
    for chunk in chunks:
        chunk.to(torch.cuda.current_device())
    ddp = DistributedDataParallelConfig(use_distributed_optimizer=run.parallel.distributed_optimizer)
    model = wrap(chunks, ddp)
    objectives.install()
    optimizer, scheduler = core.build_optimizer(run, model)

    folder, first = checkpoint_dir(run), torch.distributed.get_rank() == 0
    if newest_checkpoint(folder) is not None:
        objectives.steps_done = core.load_checkpoint(folder, model, optimizer, scheduler)
    loader = training_batches(run, objectives.steps_done * run.trainer.global_batch_size)
    micro_batches = run.trainer.global_batch_size // (run.trainer.micro_batch_size * run.parallel.data)
    schedule, metrics = get_forward_backward_func(), dict[str, float]()
    while objectives.steps_done < run.trainer.max_steps:
        for each in model:
            each.zero_grad_buffer()
        optimizer.zero_grad()
        batches = objectives.start_step(list(islice(loader, micro_batches)))
        reported = schedule(
            forward_step_func=core.forward_step,
            data_iterator=[iter(batches) for _ in model] if len(model) > 1 else iter(batches),
            model=model if len(model) > 1 else model[0],
            num_microbatches=micro_batches,
            seq_length=objectives.sequence_length,
            micro_batch_size=run.trainer.micro_batch_size,
            forward_only=False,
        )
        metrics = {"loss": language_loss(reported), **objectives.end_step()}
        optimizer.step()
        scheduler.step(1)
        objectives.after_update()
        done = objectives.steps_done
        if first and done % run.trainer.log_every == 0:
            shown = "  ".join(f"{name} {value:.4f}" for name, value in metrics.items())
            print(f"step {done}  {shown}", flush=True)
        if done == run.trainer.max_steps or (run.trainer.checkpoint_every and not done % run.trainer.checkpoint_every):
            saved = core.save_checkpoint(folder, model, done, run, optimizer, scheduler)
            if first:
                print(f"saved {saved}; next: nemo-pre export {saved} HF_DIR", flush=True)
    objectives.finish()
    torch.distributed.destroy_process_group()
    return metrics


def start_ranks(run: RunConfig, on_cpu: bool) -> None:
    """The process groups and random states of the run's layout."""
    import torch
    from megatron.core import parallel_state as ps
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29511"}.items():
        os.environ.setdefault(name, value)  # a single process needs no torchrun
    if on_cpu:
        torch.set_num_threads(1)
    else:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    timeout = timedelta(seconds=run.trainer.rank_timeout)
    torch.distributed.init_process_group("gloo" if on_cpu else "nccl", timeout=timeout)
    ps.initialize_model_parallel(
        tensor_model_parallel_size=run.parallel.tensor,
        pipeline_model_parallel_size=run.parallel.pipeline,
        virtual_pipeline_model_parallel_size=run.parallel.virtual_pipeline,
        context_parallel_size=run.parallel.context,
    )
    torch.manual_seed(run.seed)
    model_parallel_cuda_manual_seed(run.seed + 100 * ps.get_pipeline_model_parallel_rank())


def training_batches(run: RunConfig, consumed: int) -> Iterator[dict[str, Any]]:
    """This data-parallel rank's micro-batches of the prepared data, from a position in the stream on."""
    from megatron.core import parallel_state as ps
    from torch.utils.data import DataLoader

    from nemo_pre.data.collate import Collate
    from nemo_pre.data.dataset import ConversationDataset
    from nemo_pre.data.manifest import read_manifest
    from nemo_pre.data.preprocessing import build_preprocessing
    from nemo_pre.data.sampler import BatchShape, ShuffledStream, TrainingBatches
    from nemo_pre.data.tokenizer import padding_id

    if run.data.blend or run.data.packing or run.data.features:
        raise ValueError("This example reads one set of images: leave out data.blend, data.packing and data.features.")
    how = build_preprocessing(run)
    dataset = ConversationDataset(read_manifest(run.data.path), "train", how, run.data.on_error)
    batch, micro = run.trainer.global_batch_size, run.trainer.micro_batch_size
    shape = BatchShape(micro, batch, ps.get_data_parallel_rank(), ps.get_data_parallel_world_size())
    order = TrainingBatches(ShuffledStream(sum(dataset.sizes), run.data.shuffle_seed), shape, consumed)
    collate = Collate(how.max_text_tokens, padding_id(how.tokenizer), how.native is not None)
    return iter(DataLoader(dataset, batch_sampler=order, collate_fn=collate))  # type: ignore[arg-type]


if __name__ == "__main__":
    try:
        asked = compose_run(sys.argv[1:])
        for warning in check_options(asked):
            print(warning, file=sys.stderr)
        train(asked)
    except ValueError as error:
        sys.exit(str(error))
