"""A rehearsed rank's training with NeMo: the run's own trainer, strategy, model and callbacks."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback

from nemo_pre.rehearsal.batches import steps
from nemo_pre.rehearsal.found import Order
from nemo_pre.rehearsal.watch import Watch


def train(order: Order, watch: Watch) -> None:
    """Train the rank's steps on synthetic batches."""
    from nemo.utils import logging

    from nemo_pre.train import build_model, build_trainer, objective_callbacks

    logging.set_verbosity(logging.ERROR)
    config = order.config
    callbacks = [_BeginsPhases(watch), *objective_callbacks(config), _Tells(watch)]
    trainer = build_trainer(config, True, callbacks=callbacks)
    model = build_model(config, True)
    language = model.config.language_transformer_config
    for each in (language, model.config, model.config.vision_projection_config):
        each.use_cpu_initialization = False  # Transformer Engine's layers are made on the GPU
        each.perform_initialization = False
    watch.progress("building")
    trainer.fit(model, _Data(order))


class _BeginsPhases(Callback):
    """The first callback: what others do as a step begins belongs to it."""

    def __init__(self, watch: Watch) -> None:
        self.watch = watch

    def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
        self.watch.begin(trainer.global_step + 1)


class _Tells(Callback):
    """The last callback: tells the watch how far a step is."""

    def __init__(self, watch: Watch) -> None:
        self.watch = watch

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        from nemo_pre.neva.model import model_chunks

        self.watch.start(model_chunks(trainer))

    def on_before_optimizer_step(self, *_: Any) -> None:
        self.watch.before_update()

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        models = [getattr(chunk, "module", chunk) for chunk in trainer.strategy.megatron_parallel]
        optimizers = [getattr(optimizer, "mcore_optimizer", optimizer) for optimizer in trainer.optimizers]
        self.watch.after_step(models, optimizers)

    def on_train_end(self, *_: Any) -> None:
        self.watch.end()


class _Data(pl.LightningDataModule):
    """Micro-batches without data, handed on as the run's own data module does."""

    def __init__(self, order: Order) -> None:
        super().__init__()
        from nemo.lightning.pytorch.plugins import MegatronDataSampler

        self.order = order
        config = order.config
        self.data_sampler = MegatronDataSampler(
            seq_len=config.data.sequence_length,
            micro_batch_size=config.trainer.micro_batch_size,
            global_batch_size=config.trainer.global_batch_size,
            output_log=False,
        )
        self.data_sampler.transform_dataloader = lambda loader, consumed_samples=0: loader

    def train_dataloader(self) -> Any:
        from torch.utils.data import DataLoader, IterableDataset

        order = self.order

        class Batches(IterableDataset):
            def __iter__(self) -> Any:
                return steps(order.config, order.micro_batches, order.place.data)

        return DataLoader(Batches(), batch_size=None)
