"""On a rank: one run's parameters, what autograd keeps, and its FLOPs, measured on the product's own trainer."""

from __future__ import annotations

import weakref
from dataclasses import dataclass, field
from typing import Any

from nemo_pre.config.run import RunConfig


@dataclass
class Measured:
    """Of one rank.

    Attributes:
        parameters: number by part of the model.
        trainable: of them, those with a gradient.
        saved_bytes: the most that tensors saved for backward passes take at once, parameters aside.
        flops: of a step's matrix products, forward and backward.
        state: bytes of weights, gradients, optimizer and teacher.
    """

    parameters: dict[str, int] = field(default_factory=dict)
    trainable: int = 0
    saved_bytes: int = 0
    flops: int = 0
    state: dict[str, int] = field(default_factory=dict)


@dataclass(eq=False)
class Kept:
    """A tensor in the hands of a graph node."""

    tensor: Any


class SavedBytes:
    """Hooks that count the storages autograd holds, each once, from saving to the release of the last graph node."""

    def __init__(self, ignored: set[int]) -> None:
        self.ignored = ignored
        self.holders: dict[int, int] = {}
        self.held = self.peak = 0

    def pack(self, tensor: Any) -> Kept:
        kept = Kept(tensor.detach())  # not the graph that leads to it: it would keep itself alive
        storage = tensor.untyped_storage()
        key, size = storage.data_ptr(), storage.nbytes()
        if key in self.ignored or not size:
            return kept
        if self.holders.get(key, 0) == 0:
            self.held += size
        self.holders[key] = self.holders.get(key, 0) + 1
        self.peak = max(self.peak, self.held)
        weakref.finalize(kept, self.release, key, size)
        return kept

    def release(self, key: int, size: int) -> None:
        self.holders[key] -= 1
        if self.holders[key] == 0:
            self.held -= size

    @staticmethod
    def unpack(kept: Kept) -> Any:
        return kept.tensor


def measure(config: RunConfig, images_per_row: int = 1) -> Measured:
    from nemo_pre.compat import cpu_backend

    cpu_backend.apply()
    from nemo_pre.train import build_model, build_trainer, objective_callbacks

    measured = Measured()
    callbacks = [*objective_callbacks(config), build_instruments(measured)]
    trainer = build_trainer(config, on_gpu=False, callbacks=callbacks)
    trainer.fit(build_model(config, on_gpu=False), build_data(config, images_per_row))
    return measured


def build_instruments(measured: Measured) -> Any:
    import torch
    from lightning.pytorch.callbacks import Callback
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    from nemo_pre.neva.model import model_chunks

    class Instruments(Callback):
        """Step 1: what autograd saves. Step 2: FLOPs, with attention as plain matrix products."""

        def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
            chunks = model_chunks(trainer)
            if trainer.global_step == 0:
                for chunk in chunks:
                    for name, parameter in chunk.named_parameters():
                        part = name.split(".")[0 if "language_model" not in name.split(".")[0] else 1]
                        measured.parameters[part] = measured.parameters.get(part, 0) + parameter.numel()
                        measured.trainable += parameter.numel() * parameter.requires_grad
                weights = {
                    tensor.untyped_storage().data_ptr()
                    for chunk in chunks
                    for tensor in (*chunk.parameters(), *chunk.buffers())
                }
                self.saved = SavedBytes(weights)
                self.hooks = torch.autograd.graph.saved_tensors_hooks(self.saved.pack, self.saved.unpack)
                self.hooks.__enter__()
            else:
                self.backend = sdpa_kernel(SDPBackend.MATH)
                self.backend.__enter__()
                self.counter = FlopCounterMode(display=False)
                self.counter.__enter__()

        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            if trainer.global_step == 1:
                self.hooks.__exit__(None, None, None)
                measured.saved_bytes = self.saved.peak
                measured.state = state_bytes(trainer, model_chunks(trainer))
            else:
                self.counter.__exit__(None, None, None)
                self.backend.__exit__(None, None, None)
                measured.flops = self.counter.get_total_flops()

    return Instruments()


def state_bytes(trainer: Any, chunks: list[Any]) -> dict[str, int]:
    """Bytes of what lives from step to step."""
    import torch

    anchors = ("laver_teacher.", "ema_projection.")
    weights = [p for chunk in chunks for name, p in chunk.named_parameters() if not name.startswith(anchors)]
    gradients = [b.grad_data for chunk in trainer.strategy.megatron_parallel for b in chunk.module.buffers]
    theirs = {weight.untyped_storage().data_ptr() for weight in weights}
    optimizer = []
    for megatron in trainer.optimizers[0].mcore_optimizer.chained_optimizers:
        optimizer += [p for group in megatron.optimizer.param_groups for p in group["params"]]
        optimizer += [v for state in megatron.optimizer.state.values() for v in state.values() if torch.is_tensor(v)]
    units = [unit for chunk in chunks if hasattr(chunk, "laver_teacher") for unit in chunk.laver_teacher._units]
    anchor = [p for chunk in chunks if hasattr(chunk, "ema_projection") for p in chunk.ema_projection.parameters()]

    def size(tensors: list[Any]) -> int:
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    return {
        "weights": size(weights),
        "gradients": size(gradients),
        "optimizer": size([tensor for tensor in optimizer if tensor.untyped_storage().data_ptr() not in theirs]),
        "teacher": size([tensor for unit in units for tensor in (unit.average.shard, unit.flat)]),
        "moving anchor": size(anchor),
    }


def build_data(config: RunConfig, images_per_row: int) -> Any:
    """Rows of the full length, each with ``images_per_row`` images; all micro-batches are alike."""
    import lightning.pytorch as pl
    import torch
    from nemo.lightning.pytorch.plugins import MegatronDataSampler
    from torch.utils.data import DataLoader

    from nemo_pre.config.derived import num_visual_tokens
    from nemo_pre.config.vision_families import is_native, merge_size
    from nemo_pre.data.conversation import IGNORE_INDEX, IMAGE_TOKEN_INDEX

    rows, size = config.trainer.micro_batch_size, config.model.vision.image_size
    features = (num_visual_tokens(config.model), config.model.vision.hidden_size)
    seen = (3, size, size) if config.data.features is None else features
    text = config.data.sequence_length - images_per_row * (num_visual_tokens(config.model) - 1)
    ids = torch.randint(config.model.language.vocab_size, (rows, text + 1), generator=torch.Generator().manual_seed(0))
    tokens, labels = ids[:, :-1].clone(), ids[:, 1:].clone()
    tokens[:, : 2 * images_per_row : 2] = IMAGE_TOKEN_INDEX
    labels[:, : 2 * images_per_row] = IGNORE_INDEX
    batch = {
        "tokens": tokens,
        "labels": labels,
        "loss_mask": (labels != IGNORE_INDEX).float(),
        "position_ids": torch.arange(text).repeat(rows, 1),
        "attention_mask": None,
        "media": torch.randn(rows * images_per_row, *seen),
        "num_media_tiles": [1] * rows * images_per_row,
    }
    if is_native(config.model.vision):  # images of the most visual tokens there may be, two rows of them
        most, pixels = num_visual_tokens(config.model), 3 * config.model.vision.patch_size**2
        batch["media"] = torch.randn(rows * images_per_row * most, merge_size(config.model.vision) ** 2, pixels)
        batch["media_grids"] = [(2, most // 2)] * rows * images_per_row
    if config.data.packing:  # a sample begins with its image
        batch["segments"] = (tokens == IMAGE_TOKEN_INDEX).cumsum(dim=1) - 1
    steps = [
        {**batch, "media": batch["media"].clone()}
        for _ in range(config.trainer.max_steps * config.trainer.global_batch_size)
    ]

    class Given(MegatronDataSampler):
        def transform_dataloader(self, dataloader: DataLoader, consumed_samples: int = 0) -> DataLoader:
            return DataLoader(steps, batch_size=None)  # type: ignore[arg-type]  # a list is a dataset

    class GivenData(pl.LightningDataModule):
        def __init__(self) -> None:
            super().__init__()
            self.data_sampler = Given(
                seq_len=config.data.sequence_length,
                micro_batch_size=rows,
                global_batch_size=config.trainer.global_batch_size,
                output_log=False,
            )

        def train_dataloader(self) -> DataLoader:
            return DataLoader([0])  # type: ignore[arg-type]

    return GivenData()
