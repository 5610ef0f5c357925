"""The rank's side of the generation tests: a run with PRe that trains a step, generates, and trains another."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor


@dataclass
class GenerationJob:
    """``parallel``: fields of ParallelConfig; ``prompts``: (tokens, images or None); ``batch``: one micro-batch, which
    every step of every data-parallel rank trains on."""

    parallel: dict[str, Any]
    prompts: list[tuple[Tensor, Tensor | None]]
    labelled: list[tuple[Tensor, Tensor | None, Tensor]]
    batch: dict[str, Any]
    state: dict[str, Tensor]
    vocab_size: int
    stop_token: int
    max_new_tokens: int
    num_microbatches: int = 2


@dataclass
class GenerationRecord:
    answers: list[list[int]]
    loss: tuple[float, int]
    training_before_and_after: tuple[list[bool], list[bool]]
    metrics: list[dict[str, float]] = field(default_factory=list)


def generate_in_training(job: GenerationJob) -> GenerationRecord:
    from nemo_pre.compat import cpu_backend

    cpu_backend.apply()
    from lightning.pytorch.callbacks import Callback

    from nemo_pre.callbacks import PReCallback, StepPlanning
    from nemo_pre.generation import TokenSequence, answer_loss, generate
    from nemo_pre.neva.model import model_chunks
    from nemo_pre.train import build_model, build_trainer
    from tests.parity.job import Job, build_data
    from tests.parity.shape import tiny_run
    from tests.ranks.sharded import load_full

    steps = 2
    run = tiny_run(
        output_dir=os.devnull,
        parallel=job.parallel,
        pre={"layers": [3]},
        num_microbatches=job.num_microbatches,
        micro_batch_size=len(job.batch["tokens"]),
        max_steps=steps,
    )
    run.optim.lr = 1e-15  # a step that moves no float32 weight: the step after generation must repeat the first
    replicas = job.parallel.get("data", 1)
    data = [[[job.batch] * job.num_microbatches for _ in range(replicas)] for _ in range(steps)]
    records: list[GenerationRecord] = []
    metrics: list[dict[str, float]] = []

    class GenerateBetweenSteps(Callback):
        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            load_full(model_chunks(trainer), job.state)
            for optimizer in trainer.optimizers:
                optimizer.mcore_optimizer.reload_model_params()

        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            metrics.append({name: float(value) for name, value in trainer.callback_metrics.items()})
            if records:
                return
            chunks = model_chunks(trainer)
            before = [module.training for chunk in chunks for module in chunk.language_model.modules()]
            answers = generate(
                chunks,
                [TokenSequence(*prompt) for prompt in job.prompts],
                job.max_new_tokens,
                job.stop_token,
                job.vocab_size,
                micro_batch_size=2,
            )
            loss = answer_loss(chunks, [TokenSequence(*labelled) for labelled in job.labelled], micro_batch_size=2)
            after = [module.training for chunk in chunks for module in chunk.language_model.modules()]
            records.append(GenerationRecord(answers, loss, (before, after)))

    callbacks = [StepPlanning(), PReCallback(run.objective.pre, seed=run.seed), GenerateBetweenSteps()]
    trainer = build_trainer(run, on_gpu=False, callbacks=callbacks)
    given = Job(job.parallel, None, data, job.state)
    trainer.fit(build_model(run, on_gpu=False), build_data(given, run))
    records[0].metrics = metrics
    return records[0]
