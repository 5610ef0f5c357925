"""The data module of a run: training batches for NeMo's MegatronStrategy.

NeMo's own sampler shuffles per data-parallel rank, so a resume at another size replays other samples, and its
data modules reset the count of consumed samples when the first validation starts. Here the position in one
global stream is the whole state; :mod:`nemo_pre.data.sampler` says how batches follow from it. Validation reads its
samples itself (:mod:`nemo_pre.callbacks.exact_match`).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from nemo.lightning.pytorch.plugins import MegatronDataSampler
from torch.utils.data import DataLoader

from nemo_pre.config.run import RunConfig
from nemo_pre.config.schema import DataConfig
from nemo_pre.data.collate import Collate
from nemo_pre.data.dataset import ConversationDataset, Preprocessing
from nemo_pre.data.lengths import read_lengths
from nemo_pre.data.manifest import Manifest, check_training_size, read_manifest
from nemo_pre.data.packed import PackedCollate, PackedDataset
from nemo_pre.data.packing import PackedStream, Packing
from nemo_pre.data.preprocessing import build_preprocessing
from nemo_pre.data.sampler import (
    PACKED,
    BatchShape,
    BlendedStream,
    SkippingStream,
    Stream,
    TrainingBatches,
    samples_fingerprint,
    whole_position,
)
from nemo_pre.data.tokenizer import padding_id
from nemo_pre.options import choices_of
from nemo_pre.orphans import end_with_the_loader
from nemo_pre.run_files.skipped_samples import Skipped, read_skipped

log = logging.getLogger(__name__)


class GlobalStreamSampler(MegatronDataSampler):
    """Gives each rank its slices of the global stream, and counts what the job as a whole has consumed.

    ``output_log`` of the base class is off: it moves two scalars to the device at every step.
    """

    def __init__(
        self,
        seq_len: int,
        micro_batch_size: int,
        global_batch_size: int,
        shuffle_seed: int,
        weights: Sequence[float] = (1.0,),
        packing: Packing | None = None,
    ):
        super().__init__(
            seq_len=seq_len,
            micro_batch_size=micro_batch_size,
            global_batch_size=global_batch_size,
            dataloader_type="single",
            output_log=False,
        )
        self.shuffle_seed = shuffle_seed
        self.weights = weights
        self.packing = packing
        self.skipped: list[tuple[int, int]] = []  # ranges of the stream's positions that are left out

    def transform_dataloader(self, dataloader: DataLoader, consumed_samples: int = 0) -> DataLoader:
        """A loader of the same data set with this rank's batches of the stream."""
        from megatron.core import parallel_state

        shape = BatchShape(
            self.micro_batch_size,
            self.global_batch_size,
            parallel_state.get_data_parallel_rank(),
            parallel_state.get_data_parallel_world_size(),
        )
        dataset = dataloader.dataset
        assert isinstance(dataset, (ConversationDataset, PackedDataset)), type(dataset)
        samples = BlendedStream(dataset.sizes, self.weights, self.shuffle_seed)
        stream: Stream = samples if self.packing is None else PackedStream(samples, self.packing)
        stream = SkippingStream(stream, self.skipped) if self.skipped else stream
        batches = TrainingBatches(stream, shape, self.init_consumed_samples)
        return DataLoader(
            dataset,
            batch_sampler=batches,  # type: ignore[arg-type]  # TrainingBatches has no end, hence no length
            num_workers=dataloader.num_workers,
            collate_fn=dataloader.collate_fn,
            pin_memory=dataloader.pin_memory,
            persistent_workers=dataloader.persistent_workers,
            worker_init_fn=dataloader.worker_init_fn,
        )

    def compute_consumed_samples(self, steps_since_resume: int = 0) -> int:
        """Samples the job has trained on since its first step, over all data-parallel ranks."""
        return self.init_consumed_samples + steps_since_resume * self.global_batch_size


class ShardedVLMDataModule(pl.LightningDataModule):
    """Conversations about images from prepared shards.

    Args:
        manifest: of the data directory, whose training split is read where there is no blend.
        preprocessing: how a sample becomes numbers.
        sequence_length: tokens the decoder sees, image included.
        micro_batch_size, global_batch_size: samples.
        shuffle_seed: of the training stream.
        num_workers: loader processes per rank.
        on_error: raise | skip.
        blend: manifests and weights of what is trained on instead of the manifest's training split.
        on_state_mismatch: raise | restart: what a resume does whose data state is missing or another data's.
        packing_window: samples of the stream that are packed into rows at a time; None: a row is a sample. With
            packing, batch sizes and consumed samples count rows.
        skipped: what roll-backs of the run left out, of this stream or others.

    Raises:
        ValueError: a shard is missing or has the wrong size, there is less than one global batch, or packing has no
            lengths.
    """

    def __init__(
        self,
        manifest: Manifest,
        preprocessing: Preprocessing,
        sequence_length: int,
        micro_batch_size: int,
        global_batch_size: int,
        shuffle_seed: int = 0,
        num_workers: int = 0,
        on_error: str = "raise",
        blend: Sequence[tuple[Manifest, float]] = (),
        on_state_mismatch: str = "raise",
        packing_window: int | None = None,
        skipped: Sequence[Skipped] = (),
    ):
        super().__init__()
        if on_state_mismatch not in choices_of(DataConfig, "on_state_mismatch"):
            allowed = ", ".join(choices_of(DataConfig, "on_state_mismatch"))
            raise ValueError(f"data.on_state_mismatch={on_state_mismatch} is not one of {allowed}")
        sources = blend or [(manifest, 1.0)]
        self.training, self.weights = [source for source, _ in sources], [weight for _, weight in sources]
        check_training_size(self.training, global_batch_size)
        self.on_state_mismatch = on_state_mismatch
        self.tokenizer = preprocessing.tokenizer
        self.num_workers = num_workers
        self.train_dataset = ConversationDataset(self.training, "train", preprocessing, on_error)
        padding, native = padding_id(preprocessing.tokenizer), preprocessing.native is not None
        self.collate = Collate(preprocessing.max_text_tokens, padding, native)
        self.packing = None
        if packing_window is not None:
            lengths = np.concatenate([read_lengths(source, preprocessing) for source in self.training])
            # A sample that cannot be read takes the place of one token, until another is read in its place.
            self.packing = Packing(lengths.clip(min=1), sequence_length, packing_window)
            self.packed_collate = PackedCollate(sequence_length, padding, native)
        self.data_sampler = GlobalStreamSampler(
            sequence_length, micro_batch_size, global_batch_size, shuffle_seed, self.weights, self.packing
        )
        stream = (self.fingerprint, shuffle_seed)
        self._skip([(each.first, each.end) for each in skipped if (each.data, each.shuffle_seed) == stream])
        self.first_step = 0  # optimizer steps done before this process began
        self._restored = False

    def train_dataloader(self) -> DataLoader:
        # The only place that moves the origin of the count: by now the trainer has its restored step.
        self.first_step = self.trainer.global_step if self.trainer else 0
        self.data_sampler.init_global_step = self.first_step
        if self.first_step and not self._restored:
            # Lightning passes over a data module whose name the checkpoint does not have, and says nothing.
            self._state_mismatch("the checkpoint has no state of the data", "resume from one that has")
        if self.packing is not None:
            return self._dataloader(PackedDataset(self.train_dataset), self.packed_collate)
        return self._dataloader(self.train_dataset, self.collate)

    def _dataloader(self, dataset: ConversationDataset | PackedDataset, collate: Callable[..., Any]) -> DataLoader:
        return DataLoader(
            dataset,  # type: ignore[arg-type]  # map-style by its methods; loader workers need no torch base class
            num_workers=self.num_workers,
            collate_fn=collate,
            pin_memory=torch.cuda.is_available(),
            persistent_workers=self.num_workers > 0,
            worker_init_fn=end_with_the_loader,
        )

    @property
    def consumed_samples(self) -> int:
        """Samples trained on since the first step of the first run, over all data-parallel ranks."""
        steps = self.trainer.global_step - self.first_step if self.trainer else 0
        return self.data_sampler.compute_consumed_samples(steps)

    def counts(self) -> dict[str, int]:
        """This rank's ``skipped`` and ``cut`` training samples so far."""
        return self.train_dataset.counts()

    @property
    def fingerprint(self) -> str:
        """Changes with the training samples of any source, with the proportions of a blend, and with the rows that
        samples are packed into."""
        samples = samples_fingerprint([manifest.fingerprint for manifest in self.training], self.weights)
        return samples if self.packing is None else f"{samples}{PACKED}{self.packing.fingerprint}"

    def state_dict(self) -> dict[str, Any]:
        return {
            "consumed_samples": self.consumed_samples,
            "shuffle_seed": self.data_sampler.shuffle_seed,
            "data": self.fingerprint,
            "skipped": self.data_sampler.skipped,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes up the stream where the checkpoint left it.

        Raises:
            ValueError: the checkpoint was trained on other data or in another order, unless told to restart.
        """
        self._restored = True
        missing = sorted({"consumed_samples", "shuffle_seed", "data"} - state_dict.keys())
        if missing:
            self._state_mismatch(f"the checkpoint's state of the data has no {', '.join(missing)}", "resume another")
        elif state_dict["data"] != self.fingerprint:
            directories = ", ".join(str(manifest.directory) for manifest in self.training)
            self._state_mismatch(
                f"the checkpoint was trained on other data than {directories}, or on another blend of it",
                "give it the same data, or start a new run from its weights with init_from",
            )
        elif state_dict["shuffle_seed"] != self.data_sampler.shuffle_seed:
            self._state_mismatch(
                f"the checkpoint was trained with data.shuffle_seed={state_dict['shuffle_seed']}",
                "resume with the same",
            )
        else:
            self.data_sampler.init_consumed_samples = int(state_dict["consumed_samples"])
            self.data_sampler.prev_consumed_samples = int(state_dict["consumed_samples"])
            self._skip([(int(first), int(end)) for first, end in state_dict.get("skipped", ())])

    def trained_between(self, step: int, later_step: int, reason: str) -> Skipped:
        """The samples that the steps behind ``step``, up to ``later_step``, were trained on."""
        sampler = self.data_sampler
        first, last = (
            whole_position(sampler.compute_consumed_samples(each - self.first_step) - back, sampler.skipped)
            for each, back in ((step, 0), (later_step, 1))
        )
        return Skipped(first, last + 1, self.fingerprint, sampler.shuffle_seed, step, later_step, reason)

    def _skip(self, ranges: Sequence[tuple[int, int]]) -> None:
        self.data_sampler.skipped = sorted({*self.data_sampler.skipped, *ranges})

    def _state_mismatch(self, what: str, cure: str) -> None:
        if self.on_state_mismatch == "raise":
            raise ValueError(f"{what}: {cure} (data.on_state_mismatch=restart begins the data anew)")
        log.warning("%s: the data begins anew at its first sample, as data.on_state_mismatch=restart says.", what)


def build_data_module(config: RunConfig, tokenizer: Any = None) -> ShardedVLMDataModule:
    """The data module of a run; ``tokenizer`` spares loading it twice.

    Raises:
        ValueError: data missing or broken, or a tokenizer larger than the model's vocabulary.
    """
    return ShardedVLMDataModule(
        read_manifest(config.data.path),
        build_preprocessing(config, tokenizer),
        sequence_length=config.data.sequence_length,
        micro_batch_size=config.trainer.micro_batch_size,
        global_batch_size=config.trainer.global_batch_size,
        shuffle_seed=config.data.shuffle_seed,
        num_workers=config.data.num_workers,
        on_error=config.data.on_error,
        blend=[(read_manifest(source.path), source.weight) for source in config.data.blend or []],
        on_state_mismatch=config.data.on_state_mismatch,
        packing_window=config.data.packing_window if config.data.packing else None,
        skipped=read_skipped(config.output_dir) if config.resume else (),
    )
