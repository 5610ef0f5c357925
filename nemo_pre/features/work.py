"""What there is to do for a directory of features: how, and shard by shard."""

from __future__ import annotations

from dataclasses import dataclass

from nemo_pre.data.features import FeatureFile
from nemo_pre.data.manifest import Shard


@dataclass
class Options:
    """The words of ``nemo-pre data features`` that are not the run's.

    Attributes:
        dtype: of the features, and what the encoder computes in.
        part: (number from 1, of how many): the shards this process takes.
        batch: images the encoder runs on at a time.
    """

    dtype: str = "bfloat16"
    part: tuple[int, int] = (1, 1)
    batch: int = 32


@dataclass(frozen=True)
class Work:
    """A shard, how many images each of its samples has, and the file their features go to."""

    shard: Shard
    images_of_samples: list[int]
    file: FeatureFile
