"""The map-style dataset: a position in the shards becomes tokens, labels and image tensors."""

from __future__ import annotations

import logging
import multiprocessing
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import TYPE_CHECKING, Any

from nemo_pre.config.schema import DataConfig
from nemo_pre.data.conversation import encode
from nemo_pre.data.errors import SampleError
from nemo_pre.data.features import CachedFeatures
from nemo_pre.data.images import image_tiles
from nemo_pre.data.manifest import Manifest, verify_shards
from nemo_pre.data.native_images import NativeResolution
from nemo_pre.data.shards import RawSample, ShardedSamples
from nemo_pre.options import choices_of

if TYPE_CHECKING:
    import torch

log = logging.getLogger(__name__)

MAX_LOADERS = 256  # per rank
GIVE_UP_AFTER = 100  # unreadable samples in a row: then it is the dataset, not a sample
NAMED_SKIPS = 20  # per loader process; of the skips after them every hundredth is named


@dataclass(frozen=True)
class Preprocessing:
    """How a sample becomes numbers.

    Attributes:
        max_text_tokens: T, the width of a batch's text, in which an image counts as one token.
        tile_tokens: visual tokens of a tile; with native resolution the least of an image.
        max_tiles: of an image, its thumbnail among them.
        native: how images keep their aspect ratio; None: they become squares.
        features: directory of an encoder's outputs, which are read instead of images.
        pixels: read the images too, for a loss that looks at them.
        targets: of each objective that reads a frozen model's features, its name, their directory and the option that
            names it; read of the training split.
    """

    tokenizer: Any
    chat_template: str
    max_text_tokens: int
    tile_tokens: int
    image_size: int
    image_mean: tuple[float, ...]
    image_std: tuple[float, ...]
    image_resize: str = "whole"
    image_filter: str = "bicubic"
    image_crop_from: int | None = None
    max_tiles: int = 1
    native: NativeResolution | None = None
    features: str | None = None
    pixels: bool = False
    targets: tuple[tuple[str, str, str], ...] = ()

    @property
    def sequence_length(self) -> int:
        """Tokens the decoder sees, images expanded."""
        return self.max_text_tokens + self.tile_tokens - 1

    def encode_image(self, image: bytes, where: str) -> torch.Tensor:
        """float32 [tiles, 3, image_size, image_size]; with native resolution [rows, columns, patches, pixels]."""
        if self.native is not None:
            return self.native.patches(image, self.image_mean, self.image_std, where, self.image_filter)
        how = (self.max_tiles, self.image_resize, self.image_filter, self.image_crop_from)
        return image_tiles(image, self.image_size, self.image_mean, self.image_std, where, *how)

    def visual_tokens(self, image: torch.Tensor) -> int:
        """Number of visual tokens of an image as :meth:`encode_image` gave it."""
        return len(image) * (image.shape[1] if self.native is not None else self.tile_tokens)


@dataclass(frozen=True)
class Item:
    """``tokens`` and ``labels`` of the same length (at most T); ``images`` as :meth:`Preprocessing.encode_image` gives
    them, or their features [1, tokens, d_vision], beside which ``pixels`` are the images if they are wanted;
    ``targets`` has by objective the features [1, tokens, width] of each image that it compares visual tokens with."""

    key: str
    tokens: list[int]
    labels: list[int]
    images: list[torch.Tensor]
    pixels: list[torch.Tensor] = field(default_factory=list)
    targets: dict[str, list[torch.Tensor]] = field(default_factory=dict)


class ConversationDataset:
    """The samples of one split, of several prepared sets one after another.

    ``on_error=skip`` names an unreadable sample in the log and puts the next readable one of its set in its place.
    Which sample replaces which depends on the data alone, so every rank and every resumed run agrees, and every rank
    has its micro-batch. :meth:`counts` adds up over the loader processes of this rank.

    Attributes:
        sizes: samples of each set.
    """

    def __init__(
        self,
        manifests: Manifest | Sequence[Manifest],
        split: str,
        preprocessing: Preprocessing,
        on_error: str = "raise",
    ):
        if on_error not in choices_of(DataConfig, "on_error"):
            allowed = ", ".join(choices_of(DataConfig, "on_error"))
            raise ValueError(f"data.on_error={on_error} is not one of {allowed}")
        manifests = [manifests] if isinstance(manifests, Manifest) else list(manifests)
        for manifest in manifests:
            if not manifest.shards.get(split):
                raise ValueError(f"{manifest.directory} has no {split} shards: prepare the data again")
            verify_shards(manifest.shards[split], tolerate_wrong_size=on_error == "skip")
        self.samples = ShardedSamples([shard for manifest in manifests for shard in manifest.shards[split]])
        self.sizes = [manifest.num_samples(split) for manifest in manifests]
        self.preprocessing = preprocessing
        shards = self.samples.shards
        self.features = CachedFeatures(preprocessing.features, shards) if preprocessing.features else None
        wanted = preprocessing.targets if split == "train" else ()  # objectives are for training alone
        self.targets = {name: CachedFeatures(at, shards, option) for name, at, option in wanted}
        self.on_error = on_error
        # Shared memory with a slot per loader process: no two write to the same one, so no lock is needed.
        self._counters = {name: multiprocessing.RawArray("q", MAX_LOADERS + 1) for name in ("skipped", "cut")}

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, position: int) -> Item:
        start, size = self._set_of(position)
        for attempt in range(min(GIVE_UP_AFTER, size)):
            try:
                return self._load(start + (position - start + attempt) % size)
            except SampleError as error:
                if self.on_error == "raise":
                    raise
                last = error
                self.pass_over(f"{error}; the next sample is read in its place")
        raise ValueError(f"no readable sample in {attempt + 1} from position {position} on; the last error: {last}")

    def _set_of(self, position: int) -> tuple[int, int]:
        """Where the set of this sample starts, and its size."""
        for end, size in zip(accumulate(self.sizes), self.sizes, strict=True):
            if position < end:
                return end - size, size
        raise IndexError(f"sample {position} of {len(self)}")

    def counts(self) -> dict[str, int]:
        """How many samples this rank's loaders passed over (``skipped``) or shortened (``cut``) so far."""
        return {name: sum(slots) for name, slots in self._counters.items()}

    def _load(self, position: int) -> Item:
        how = self.preprocessing
        raw = self.samples.read(position, images=self.features is None or how.pixels)
        pixels = [how.encode_image(image, raw.where) for image in raw.images]
        images = pixels if self.features is None else self.features.read(position, raw.where)
        targets = {name: features.read(position, raw.where) for name, features in self.targets.items()}
        encoded = encode(
            raw.record["conversations"],
            how.tokenizer,
            how.chat_template,
            _room(raw, images, how),
            num_images=len(images),
            where=raw.where,
        )
        if encoded.cut:
            self._count("cut")
        return Item(raw.key, encoded.tokens, encoded.labels, images, pixels if self.features else [], targets)

    def pass_over(self, why: str) -> None:
        """Count a sample that is not trained on, and name it in the log."""
        skipped = self._count("skipped")
        if skipped <= NAMED_SKIPS or skipped % 100 == 0:
            log.warning("Skipped, number %d of this loader: %s", skipped, why)

    def _count(self, name: str) -> int:
        """One more in this loader process; how many it has."""
        from torch.utils.data import get_worker_info

        worker = get_worker_info()
        slot = 0 if worker is None else 1 + worker.id % MAX_LOADERS
        self._counters[name][slot] += 1
        return int(self._counters[name][slot])


def _room(raw: RawSample, images: list[torch.Tensor], how: Preprocessing) -> int:
    """How many tokens the sample may have, each image counting as one, so that it fits expanded.

    Raises:
        SampleError: the images alone fill the sequence.
    """
    visual = sum(map(how.visual_tokens, images))
    if visual + 2 > how.sequence_length:
        raise SampleError(
            f"{raw.where} has {len(images)} image(s) of {visual} visual tokens in all, which leave no room for text: "
            f"raise data.sequence_length={how.sequence_length}, or lower "
            f"{'model.vision.max_visual_tokens' if how.native else 'data.max_tiles'}"
        )
    return min(how.max_text_tokens, how.sequence_length - visual + len(images))
