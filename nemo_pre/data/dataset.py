"""The map-style dataset: a position in the shards becomes tokens, labels and an image tensor."""

from __future__ import annotations

import multiprocessing
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from nemo_pre.data.conversation import encode
from nemo_pre.data.errors import SampleError
from nemo_pre.data.images import image_tensor
from nemo_pre.data.manifest import Manifest, verify_shards
from nemo_pre.data.shards import ShardedSamples

if TYPE_CHECKING:
    import torch

ON_ERROR = ("raise", "skip")
MAX_LOADERS = 256  # per rank
GIVE_UP_AFTER = 100  # unreadable samples in a row: then it is the dataset, not a sample


@dataclass(frozen=True)
class Preprocessing:
    """How a sample becomes numbers. ``max_text_tokens`` is T, in which an image counts as one token."""

    tokenizer: Any
    chat_template: str
    max_text_tokens: int
    image_size: int
    image_mean: tuple[float, ...]
    image_std: tuple[float, ...]


@dataclass(frozen=True)
class Item:
    """``tokens`` and ``labels`` of the same length (at most T); ``image`` float32 [3, H, W] or None."""

    key: str
    tokens: list[int]
    labels: list[int]
    image: torch.Tensor | None


class ConversationDataset:
    """The samples of one split. ``on_error=skip`` puts the next readable sample in an unreadable one's place.

    Which sample replaces which depends on the data alone, so every rank and every resumed run agrees.
    :meth:`counts` adds up over the loader processes of this rank.
    """

    def __init__(self, manifest: Manifest, split: str, preprocessing: Preprocessing, on_error: str = "raise"):
        if on_error not in ON_ERROR:
            raise ValueError(f"data.on_error={on_error} is not one of {', '.join(ON_ERROR)}")
        if not manifest.shards.get(split):
            raise ValueError(f"{manifest.directory} has no {split} shards: prepare the data again")
        verify_shards(manifest.shards[split], tolerate_wrong_size=on_error == "skip")
        self.split = split
        self.samples = ShardedSamples(manifest.shards[split])
        self.preprocessing = preprocessing
        self.on_error = on_error
        # Shared memory with a slot per loader process: no two write to the same one, so no lock is needed.
        self._counters = {name: multiprocessing.RawArray("q", MAX_LOADERS + 1) for name in ("skipped", "cut")}

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, position: int) -> Item:
        for attempt in range(min(GIVE_UP_AFTER, len(self))):
            try:
                return self._load((position + attempt) % len(self))
            except SampleError as error:
                if self.on_error == "raise":
                    raise
                last = error
                self._count("skipped")
        raise ValueError(f"no readable sample in {attempt + 1} from position {position} on; the last error: {last}")

    def counts(self) -> dict[str, int]:
        """How many samples this rank's loaders passed over (``skipped``) or shortened (``cut``) so far."""
        return {name: sum(slots) for name, slots in self._counters.items()}

    def _load(self, position: int) -> Item:
        how = self.preprocessing
        raw = self.samples.read(position)
        encoded = encode(
            raw.record["conversations"],
            how.tokenizer,
            how.chat_template,
            how.max_text_tokens,
            num_images=int(raw.image is not None),
            where=raw.where,
        )
        image = None
        if raw.image is not None:
            image = image_tensor(raw.image, how.image_size, how.image_mean, how.image_std, raw.where)
        if encoded.cut:
            self._count("cut")
        return Item(raw.key, encoded.tokens, encoded.labels, image)

    def _count(self, name: str) -> None:
        from torch.utils.data import get_worker_info

        worker = get_worker_info()
        self._counters[name][0 if worker is None else 1 + worker.id % MAX_LOADERS] += 1
