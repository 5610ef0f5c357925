"""The data module of a run: training and validation batches for NeMo's MegatronStrategy.

NeMo's own sampler shuffles per data-parallel rank, so a resume at another size replays other samples, and its
data modules reset the count of consumed samples when the first validation starts. Here the position in one
global stream is the whole state; :mod:`nemo_pre.data.sampler` says how batches follow from it.
"""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import torch
from nemo.lightning.pytorch.plugins import MegatronDataSampler
from torch.utils.data import DataLoader

from nemo_pre.config.schema import RunConfig
from nemo_pre.data.collate import Collate
from nemo_pre.data.dataset import ConversationDataset, Preprocessing
from nemo_pre.data.manifest import Manifest, read_manifest
from nemo_pre.data.preprocessing import build_preprocessing
from nemo_pre.data.sampler import BatchShape, ShuffledStream, TrainingBatches, ValidationBatches
from nemo_pre.data.tokenizer import padding_id


class GlobalStreamSampler(MegatronDataSampler):
    """Gives each rank its slices of the global stream, and counts what the job as a whole has consumed.

    ``output_log`` of the base class is off: it moves two scalars to the device at every step.
    """

    def __init__(
        self, seq_len: int, micro_batch_size: int, global_batch_size: int, shuffle_seed: int, val_samples: int | None
    ):
        super().__init__(
            seq_len=seq_len,
            micro_batch_size=micro_batch_size,
            global_batch_size=global_batch_size,
            dataloader_type="single",
            output_log=False,
        )
        self.shuffle_seed = shuffle_seed
        self.val_samples = val_samples

    def transform_dataloader(self, dataloader: DataLoader, consumed_samples: int = 0) -> DataLoader:
        """The same loader with this rank's batches; ``dataset.split`` tells training from validation."""
        from megatron.core import parallel_state

        shape = BatchShape(
            self.micro_batch_size,
            self.global_batch_size,
            parallel_state.get_data_parallel_rank(),
            parallel_state.get_data_parallel_world_size(),
        )
        dataset = dataloader.dataset
        assert isinstance(dataset, ConversationDataset), type(dataset)
        batches: TrainingBatches | ValidationBatches
        if dataset.split == "train":
            stream = ShuffledStream(len(dataset), self.shuffle_seed)
            batches = TrainingBatches(stream, shape, self.init_consumed_samples)
        else:
            batches = ValidationBatches(min(self.val_samples or len(dataset), len(dataset)), shape)
        return DataLoader(
            dataset,
            batch_sampler=batches,  # type: ignore[arg-type]  # TrainingBatches has no end, hence no length
            num_workers=dataloader.num_workers,
            collate_fn=dataloader.collate_fn,
            pin_memory=dataloader.pin_memory,
            persistent_workers=dataloader.persistent_workers,
        )

    def compute_consumed_samples(self, steps_since_resume: int = 0) -> int:
        """Samples the job has trained on since its first step, over all data-parallel ranks."""
        return self.init_consumed_samples + steps_since_resume * self.global_batch_size


class ShardedVLMDataModule(pl.LightningDataModule):
    """Conversations about images from prepared shards.

    Args:
        manifest: of the data directory.
        preprocessing: how a sample becomes numbers.
        sequence_length: tokens the decoder sees, image included.
        micro_batch_size, global_batch_size: samples.
        shuffle_seed: of the training stream.
        num_workers: loader processes per rank.
        on_error: raise | skip.
        val_samples: how many samples a validation pass takes the loss of; None: the whole split.

    Raises:
        ValueError: a shard is missing or has the wrong size.
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
        val_samples: int | None = None,
    ):
        super().__init__()
        self.manifest = manifest
        self.tokenizer = preprocessing.tokenizer
        self.num_workers = num_workers
        self.train_dataset = ConversationDataset(manifest, "train", preprocessing, on_error)
        self.val_dataset = ConversationDataset(manifest, "val", preprocessing, on_error)
        self.collate = Collate(preprocessing.max_text_tokens, padding_id(preprocessing.tokenizer))
        self.data_sampler = GlobalStreamSampler(
            sequence_length, micro_batch_size, global_batch_size, shuffle_seed, val_samples
        )
        self.first_step = 0  # optimizer steps done before this process began

    def train_dataloader(self) -> DataLoader:
        # The only place that moves the origin of the count: by now the trainer has its restored step, and a
        # validation that starts later must not touch it.
        self.first_step = self.trainer.global_step if self.trainer else 0
        self.data_sampler.init_global_step = self.first_step
        return self._dataloader(self.train_dataset)

    def val_dataloader(self) -> DataLoader:
        return self._dataloader(self.val_dataset)

    def _dataloader(self, dataset: ConversationDataset) -> DataLoader:
        return DataLoader(
            dataset,  # type: ignore[arg-type]  # map-style by its methods; loader workers need no torch base class
            num_workers=self.num_workers,
            collate_fn=self.collate,
            pin_memory=torch.cuda.is_available(),
            persistent_workers=self.num_workers > 0,
        )

    @property
    def consumed_samples(self) -> int:
        """Samples trained on since the first step of the first run, over all data-parallel ranks."""
        steps = self.trainer.global_step - self.first_step if self.trainer else 0
        return self.data_sampler.compute_consumed_samples(steps)

    def counts(self) -> dict[str, int]:
        """This rank's ``skipped`` and ``cut`` training samples so far."""
        return self.train_dataset.counts()

    def state_dict(self) -> dict[str, Any]:
        return {
            "consumed_samples": self.consumed_samples,
            "shuffle_seed": self.data_sampler.shuffle_seed,
            "data": self.manifest.fingerprint,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes up the stream where the checkpoint left it.

        Raises:
            ValueError: the checkpoint was trained on other data or in another order.
        """
        if state_dict["data"] != self.manifest.fingerprint:
            raise ValueError(
                f"the checkpoint was trained on other data than {self.manifest.directory}: give it the same data, "
                f"or start a new run from its weights with init_from"
            )
        if state_dict["shuffle_seed"] != self.data_sampler.shuffle_seed:
            raise ValueError(
                f"the checkpoint was trained with data.shuffle_seed={state_dict['shuffle_seed']}: resume with the same"
            )
        self.data_sampler.init_consumed_samples = int(state_dict["consumed_samples"])
        self.data_sampler.prev_consumed_samples = int(state_dict["consumed_samples"])


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
        val_samples=config.trainer.val_samples,
    )
