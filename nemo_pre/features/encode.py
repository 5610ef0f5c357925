"""Running a frozen model over the images of shards, and writing what it gives."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from nemo_pre.config.derived import num_visual_tokens
from nemo_pre.config.run import RunConfig
from nemo_pre.data.errors import SampleError
from nemo_pre.data.images import image_tensor
from nemo_pre.data.progress import Progress
from nemo_pre.data.shards import ShardedSamples
from nemo_pre.features.check import described, target_described
from nemo_pre.features.tower import target_weights, tower_weights
from nemo_pre.features.work import Options, Wanted, Work
from nemo_pre.features.writer import ShardFeatures, claim
from nemo_pre.launch.environment import uses_gpu
from nemo_pre.neva.vision import VisionTowerConfig, encoder_features
from nemo_pre.objectives.target import Target
from nemo_pre.orphans import end_with_the_loader
from nemo_pre.terms.frozen_vision import FrozenVision

NAMED = 20  # unreadable samples; the rest are counted


def compute(config: RunConfig, options: Options, wanted: Wanted, work: list[Work]) -> None:
    """Write this process' part of the files that are missing."""
    encoder: Encoder | TargetModel
    if wanted.target is None:
        encoder, how = Encoder(config, options), described(config)
    else:
        encoder, how = TargetModel(config, options, wanted.target), target_described(config, wanted.target)
    claim(wanted, options.dtype, how, encoder.weights, encoder.source, [each.file for each in work])
    directory = wanted.directory
    number, count = options.part
    mine = [each for each in work[number - 1 :: count] if not each.file.is_whole]
    progress = Progress(f"features in {directory}, images", max(sum(each.file.images for each in mine), 1))
    unreadable, elsewhere = 0, 0
    for each in mine:
        try:
            found = write_shard(config, each, encoder, options.batch, progress)
        except BlockingIOError:
            elsewhere += 1
            progress.advance(each.file.images)
            continue
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            raise ValueError(
                f"The disk of {directory} is full: free some and start this again, it goes on."
            ) from error
        for problem in found[: max(NAMED - unreadable, 0)]:
            print(f"no features: {problem}", file=sys.stderr)
        unreadable += len(found)
    if unreadable:
        print(f"{unreadable:,} sample(s) have unreadable images; data.on_error decides about them", file=sys.stderr)
    if elsewhere:
        print(f"{elsewhere:,} shard(s) are being done by other processes", file=sys.stderr)
    print(
        f"{directory} ({encoder.source}, {len(mine) - elsewhere:,} shards written); "
        f"next: nemo-pre train ... with the option that names it"
    )


def own_device(config: RunConfig) -> torch.device:
    """This process' device."""
    place = int(os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", "0")))
    return (
        torch.device("cuda", place % torch.cuda.device_count()) if uses_gpu(config.platform) else torch.device("cpu")
    )


class Encoder:
    """The run's vision tower on this process' device.

    Attributes:
        weights: by name within the tower.
        source: where they are from.
    """

    def __init__(self, config: RunConfig, options: Options) -> None:
        self.weights, self.source = tower_weights(config)
        self.device = own_device(config)
        self.dtype = getattr(torch, options.dtype)
        self.layer, self.tokens = config.model.vision.feature_layer, num_visual_tokens(config.model)
        tower = VisionTowerConfig(config.model.vision, config.seed).configure_model()
        tower.load_state_dict(self.weights)
        self.tower = tower.to(device=self.device, dtype=self.dtype).eval().requires_grad_(False)

    def __call__(self, pixels: Tensor) -> Tensor:
        """``[images, 3, H, W]`` to ``[images, tokens, width]`` on the CPU."""
        pixels = pixels.to(device=self.device, dtype=self.dtype)
        return encoder_features(self.tower, pixels, self.layer, self.tokens).cpu()


class TargetModel:
    """An objective's frozen vision model on this process' device; it computes in float32.

    Attributes:
        weights: by name within the model.
        source: where they are from.
    """

    def __init__(self, config: RunConfig, options: Options, target: Target) -> None:
        vision = config.model.vision
        self.model = FrozenVision(target, own_device(config), list(vision.image_mean), list(vision.image_std))
        self.weights, self.source = target_weights(self.model.model), str(target.path)
        self.device, self.dtype = own_device(config), getattr(torch, options.dtype)
        self.tokens = num_visual_tokens(config.model)

    def __call__(self, pixels: Tensor) -> Tensor:
        """``[images, 3, H, W]`` to ``[images, tokens, width]`` on the CPU."""
        return self.model(pixels.to(self.device), self.tokens).to(self.dtype).cpu()


def write_shard(
    config: RunConfig, work: Work, encoder: Encoder | TargetModel, batch: int, progress: Progress
) -> list[str]:
    """Write the file of one shard; returns what was wrong with samples that have no features.

    Raises:
        BlockingIOError: another process is at it.
    """
    problems: list[str] = []
    waiting: list[Tensor] = []
    with ShardFeatures(work.file, work.images_of_samples) as out:

        def flush(at_least: int) -> None:
            while len(waiting) >= max(at_least, 1):
                images = torch.stack(waiting[:batch])
                del waiting[:batch]
                out.add(encoder(images))
                progress.advance(len(images))

        for expected, pictures, problem in _pictures(config, work):
            if pictures is None:
                flush(1)
                out.add_unreadable(expected)
                progress.advance(expected)
                problems.append(problem)
                continue
            waiting.extend(pictures)
            flush(batch)
        flush(1)
        out.finish()
    return problems


def _pictures(config: RunConfig, work: Work) -> Iterator[tuple[int, Tensor | None, str]]:
    """The pictures of each sample with images, in order: how many, their pixels ``[images, 3, H, W]`` or None, and why
    none."""
    wanted = [position for position, images in enumerate(work.images_of_samples) if images]
    pictures = _Pictures(config, work, wanted)
    workers = {"num_workers": config.data.num_workers, "worker_init_fn": end_with_the_loader}
    yield from DataLoader(pictures, batch_size=None, **workers)  # type: ignore[arg-type]


class _Pictures:
    """A map-style dataset of the samples with images of a shard."""

    def __init__(self, config: RunConfig, work: Work, positions: list[int]) -> None:
        self.samples, self.positions, self.expected = ShardedSamples([work.shard]), positions, work.images_of_samples
        vision, data = config.model.vision, config.data
        self.how = (vision.image_size, tuple(vision.image_mean), tuple(vision.image_std))
        self.resize = (data.image_resize, data.image_filter, data.image_crop_from)

    def __len__(self) -> int:
        return len(self.positions)

    def __getitem__(self, number: int) -> tuple[int, Tensor | None, str]:
        position = self.positions[number]
        try:
            raw = self.samples.read(position)
            pixels = [image_tensor(image, *self.how, raw.where, *self.resize) for image in raw.images]
        except SampleError as error:
            return self.expected[position], None, str(error)
        return len(pixels), torch.stack(pixels), ""
