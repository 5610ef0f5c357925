"""The rank's side of a parity test: one run whose losses and gradients are recorded, on the backend that is there.

With NeMo it is the product's own run (its trainer, strategy, model and callbacks); only the data and the weights are
given. Without it is a loop on Megatron-Core (:mod:`tests.parity.core_job`).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any
from unittest import mock

from torch import Tensor

from tests.backend import BACKEND, NEMO
from tests.parity.layouts import world_size

# steps[step][data-parallel rank][micro-batch]: a batch in NeVA's raw format
Steps = list[list[list[dict[str, Any]]]]


@dataclass
class Job:
    """What one group of ranks runs.

    Attributes:
        parallel: fields of ParallelConfig.
        pre: fields of PReConfig; None runs without PRe.
        laver: fields of LaVerConfig; None runs without LaVer.
        viral: fields of ViralConfig; None runs without VIRAL. Features of an external target come with the data.
        model: fields of ModelConfig (attention, rope).
        steps: the data; every step sees the same weights, unless the job ``trains``.
        optim: fields of OptimConfig that differ from the tiny run's.
        trains: the optimizer's steps stay, and the weights after each are recorded.
        state: the whole model's weights.
        teacher: the weights of LaVer's teacher, named as the student's.
        language: fields of LanguageConfig that differ from the tiny model's.
        max_length: where sequences are cut.
        vision: fields of VisionConfig that differ from the tiny model's.
        packing: the rows of the data hold several samples, as their ``segments`` tell.
        settings: attributes of NeVA's and the language model's config, over what the product sets.
        bucket_size: parameters whose gradients are reduced together; None: Megatron's 40 million, here all.
        objective: a module's function that makes a further objective's callback.
        model_kind: ``own``; on plain Megatron-Core also ``hybrid``, a HybridModel as decoder, and ``llava``, its
            LLaVAModel.
        gradient_factor: multiplies injected gradients: what the tests must notice.
    """

    parallel: dict[str, Any]
    pre: dict[str, Any] | None
    steps: Steps
    state: dict[str, Tensor]
    precision: str = "fp32"
    language: dict[str, Any] = field(default_factory=dict)
    vision: dict[str, Any] = field(default_factory=dict)
    max_length: int | None = None
    packing: bool = False
    settings: dict[str, Any] = field(default_factory=dict)
    gradient_factor: float = 1.0
    laver: dict[str, Any] | None = None
    viral: dict[str, Any] | None = None
    model: dict[str, Any] = field(default_factory=dict)
    teacher: dict[str, Tensor] = field(default_factory=dict)
    bucket_size: int | None = None
    objective: Callable[[], Any] | None = None
    optim: dict[str, Any] = field(default_factory=dict)
    trains: bool = False
    model_kind: str = "own"

    @property
    def world_size(self) -> int:
        return world_size(self.parallel)


@dataclass
class StepRecord:
    """What a rank saw of one step: the logged metrics, its shards of the gradient, and what LaVer masked.

    ``masks`` has one mask of visual tokens for every micro-batch; ``weights`` are those after the step, of a job that
    trains; ``kept_inputs`` says how many decoders still hold their last input then.
    """

    metrics: dict[str, float]
    gradients: list[Any]
    masks: list[Tensor] = field(default_factory=list)
    weights: list[Any] = field(default_factory=list)
    kept_inputs: int = 0


def train(job: Job) -> list[StepRecord]:
    """On a rank: run ``job`` on this environment's backend; returns what each step gave."""
    if BACKEND == NEMO:
        return train_with_nemo(job)
    from tests.parity import core_job

    return core_job.train(job)


def run_of(job: Job) -> Any:
    """The job as a run's configuration."""
    from tests.parity.shape import tiny_run

    micro_batches = job.steps[0][0]
    run = tiny_run(
        output_dir=os.devnull,
        parallel=job.parallel,
        pre=job.pre,
        num_microbatches=len(micro_batches),
        micro_batch_size=len(micro_batches[0]["tokens"]),
        max_steps=len(job.steps),
        precision=job.precision,
        language=job.language,
        laver=job.laver,
        viral=job.viral,
        model=job.model,
        vision=job.vision,
    )
    if job.max_length is not None:
        run.data.sequence_length = job.max_length
    run.data.packing = job.packing
    for name, value in job.optim.items():
        assert hasattr(run.optim, name), name
        setattr(run.optim, name, value)
    return run


def train_with_nemo(job: Job) -> list[StepRecord]:
    from nemo_pre.compat import cpu_backend, learning_rates

    cpu_backend.apply()
    learning_rates.apply()
    from nemo_pre.train import build_model, build_trainer, objective_callbacks

    run = run_of(job)
    recorder = build_recorder(job)
    further = [] if job.objective is None else [job.objective()]
    callbacks = [*objective_callbacks(run), *further, recorder]
    trainer = build_trainer(run, on_gpu=False, callbacks=callbacks)
    trainer.strategy.ddp_config.bucket_size = job.bucket_size
    model = build_model(run, on_gpu=False)
    for name, value in job.settings.items():
        for config in (model.config, model.config.language_transformer_config):
            assert hasattr(config, name), name
            setattr(config, name, value)
    with gradients_times(job.gradient_factor), width_of_stored_targets():
        trainer.fit(model, build_data(job, run))
    return recorder.records


def masks_of(batches: list[dict[str, Any]]) -> list[Tensor]:
    """What LaVer masks of each of a step's planned micro-batches."""
    planned = [batch["micro_batch"] for batch in batches]
    return [micro_batch.branch.masked_N for micro_batch in planned if micro_batch.branch is not None]


@contextmanager
def width_of_stored_targets() -> Iterator[None]:
    """No directory of features is there to ask for their width."""
    from tests.reference.tiny import TARGET_WIDTH

    stored = SimpleNamespace(width=TARGET_WIDTH)
    with mock.patch("nemo_pre.terms.target_features.read_features", return_value=stored):
        yield


def build_recorder(job: Job) -> Any:
    from lightning.pytorch.callbacks import Callback

    from nemo_pre.callbacks.step_planning import step_planning
    from nemo_pre.neva.model import model_chunks
    from nemo_pre.parallel.micro_batch import raw_batch
    from tests.ranks.sharded import gather_gradients, gradient_shards, weight_shards

    class Recorder(Callback):
        """Puts the given weights in before each step, or the first; notes gradients once they are final."""

        def __init__(self) -> None:
            self.records: list[StepRecord] = []

        def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
            if job.trains and self.records:
                return
            load_weights(job, model_chunks(trainer))
            for optimizer in trainer.optimizers:
                optimizer.mcore_optimizer.reload_model_params()

        def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
            gather_gradients([chunk.module for chunk in trainer.strategy.megatron_parallel])
            batches = [raw_batch(item) for item in step_planning(trainer).items]
            self.records.append(StepRecord({}, gradient_shards(model_chunks(trainer)), masks_of(batches)))

        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
            self.records[-1].metrics = metrics
            self.records[-1].kept_inputs = kept_inputs(model_chunks(trainer))
            if job.trains:
                self.records[-1].weights = weight_shards(model_chunks(trainer))

    return Recorder()


def build_data(job: Job, run: Any) -> Any:
    """A data module that deals the job's micro-batches out as they are."""
    import lightning.pytorch as pl
    from nemo.lightning.pytorch.plugins import MegatronDataSampler
    from torch.utils.data import DataLoader

    class GivenBatches(MegatronDataSampler):
        def transform_dataloader(self, dataloader: DataLoader, consumed_samples: int = 0) -> DataLoader:
            from megatron.core import parallel_state

            rank = parallel_state.get_data_parallel_rank()
            mine = [batch for step in job.steps for batch in step[rank]]
            return DataLoader(mine, batch_size=None)  # type: ignore[arg-type]  # a list is a dataset

    class GivenData(pl.LightningDataModule):
        def __init__(self) -> None:
            super().__init__()
            self.data_sampler = GivenBatches(
                seq_len=run.data.sequence_length,
                micro_batch_size=run.trainer.micro_batch_size,
                global_batch_size=run.trainer.global_batch_size,
                output_log=False,
            )

        def train_dataloader(self) -> DataLoader:
            return DataLoader([0])  # type: ignore[arg-type]

    return GivenData()


def kept_inputs(chunks: list[Any]) -> int:
    """How many of the chunks' decoders, the teacher's among them, still hold what they were given."""
    decoders = [chunk.language_model.decoder for chunk in chunks]
    decoders += [chunk.laver_teacher.decoder for chunk in chunks if getattr(chunk, "laver_teacher", None) is not None]
    received = [chunk._received for chunk in chunks if getattr(chunk, "_received", None) is not None]
    return len(received) + sum(decoder.input_tensor is not None for decoder in decoders)


def load_weights(job: Job, chunks: list[Any]) -> None:
    """Put the job's weights in, the teacher's first."""
    from tests.ranks.sharded import load_full

    if job.teacher:
        load_full(chunks, {**job.state, **job.teacher})
        for chunk in chunks:
            chunk.laver_teacher.update(0.0)  # it is the student now
    load_full(chunks, job.state)


@contextmanager
def gradients_times(factor: float) -> Iterator[None]:
    """Make the injected gradient wrong, to see that the comparison notices."""
    import nemo_pre.objectives.scale as objective

    right = objective.auxiliary_loss_scale
    objective.auxiliary_loss_scale = lambda *args, **kwargs: factor * right(*args, **kwargs)
    try:
        yield
    finally:
        objective.auxiliary_loss_scale = right
