"""``nemo-pre data features``: run a frozen vision model of a run over every image the run reads, once."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from nemo_pre.config.run import RunConfig
from nemo_pre.config.words import check_spelling
from nemo_pre.data.errors import SampleError
from nemo_pre.data.features import DTYPES, MANIFEST, FeatureFile, read_features
from nemo_pre.data.manifest import Shard, verify_shards
from nemo_pre.data.shards import ShardedSamples
from nemo_pre.features.check import shards_of, training_shards
from nemo_pre.features.work import Options, Wanted, Work, wanted_features
from nemo_pre.launch.environment import external_job, is_first_rank, prepare_environment

WORDS = ("dtype", "part", "batch", "of")


def features_help() -> str:
    return """nemo-pre data features data.features=DIR experiment=NAME [OPTION=VALUE ...]

Runs the frozen encoder of the run with these options over all images it reads, and writes what the projector sees into
DIR. The same run with data.features=DIR then reads that: it neither decodes images nor holds or runs the encoder.

  nemo-pre data features of=objective.pre objective.pre.external_features=DIR experiment=NAME [OPTION=VALUE ...]

runs the frozen model that an objective compares visual tokens with, and writes what the same run then reads.

  nemo-pre data features experiment=NAME data.features=DIR optim.freeze_vision=true dry_run=true     how many bytes
  nemo-pre data features experiment=NAME data.features=DIR optim.freeze_vision=true
  srun -n 16 nemo-pre data features ...                          16 processes, each on a GPU of its own
  nemo-pre data features ... part=3/16                           the third of 16 processes, started by hand

dtype=bfloat16     float32 doubles the bytes; the encoder computes in this type, as a run of that precision would (an
                   objective's model computes in float32, and is rounded)
batch=32           images the encoder runs on at a time
data.num_workers   processes that decode images

A shard's file appears when it is complete; what a killed process leaves is done by the next. Several data sets of the
same encoder and preprocessing may share DIR."""


def features(arguments: Sequence[str]) -> None:
    """Compute what is missing of a run's features, or say how much that is.

    Raises:
        ValueError: one sentence on a wrong word, a run that cannot have features, or too little room.
    """
    overrides, options = read_options(arguments)
    from nemo_pre.checks.run import check_options
    from nemo_pre.config.compose import compose_run

    config = compose_run(overrides)
    check_options(config)
    prepare_environment(config.platform)
    wanted = wanted_features(config, options.of)
    work = plan(config, options, wanted)
    missing = [each for each in work if not each.file.is_whole]
    check_room(wanted.directory, work, missing)
    if config.dry_run:
        return
    from nemo_pre.features.encode import compute

    compute(config, options, wanted, work)


def read_options(arguments: Sequence[str]) -> tuple[list[str], Options]:
    """The run's overrides, and the rest."""
    overrides, options = [], Options(part=own_part())
    for word in arguments:
        name, _, value = word.partition("=")
        if name == "dtype":
            if value not in DTYPES:
                raise ValueError(f"{word} is unknown: choose one of {', '.join(DTYPES)}.")
            options.dtype = value
        elif name == "part":
            number, _, count = value.partition("/")
            if not (number.isdigit() and count.isdigit() and 1 <= int(number) <= int(count)):
                raise ValueError(f"{word} is not K/N with K from 1 to N, such as part=3/16.")
            options.part = (int(number), int(count))
        elif name == "batch":
            if not value.isdigit() or int(value) < 1:
                raise ValueError(f"{word} must be a whole number of 1 or more.")
            options.batch = int(value)
        elif name == "of":
            options.of = value
        else:
            check_spelling(word, WORDS)
            overrides.append(word)
    return overrides, options


def own_part() -> tuple[int, int]:
    """A process's number from 1, and how many there are, where srun or torchrun started it."""
    job = external_job(os.environ)
    return (int(job["RANK"]) + 1, int(job["WORLD_SIZE"])) if job else (1, 1)


def plan(config: RunConfig, options: Options, wanted: Wanted) -> list[Work]:
    """All shards of the run, each once.

    Raises:
        ValueError: a shard is missing or cut.
    """
    directory, read = wanted.directory, training_shards(config) if wanted.target else shards_of(config)
    shards = {shard.sha256: shard for shard in read}
    verify_shards(list(shards.values()))
    named = read_features(directory, wanted.option).files if (directory / MANIFEST).is_file() else {}
    shape = (wanted.tokens, wanted.width, options.dtype)
    work = []
    for digest, shard in shards.items():
        images = _images_of_samples(shard)
        path = directory / f"{shard.path.stem}.{digest[:12]}.safetensors"
        path = named[digest].path if digest in named else path  # another set may have the shard under another name
        work.append(Work(shard, images, FeatureFile(path, digest, shard.samples, sum(images), *shape)))
    return work


def _images_of_samples(shard: Shard) -> list[int]:
    samples, found = ShardedSamples([shard]), []
    for position in range(len(samples)):
        try:
            found.append(samples.num_images(position))
        except SampleError:  # whoever reads it is told
            found.append(0)
    return found


def check_room(directory: Path, work: list[Work], missing: list[Work]) -> None:
    """Say what is there and what is needed, once a job.

    Raises:
        ValueError: the disk has too little.
    """
    there = next(parent for parent in (directory, *directory.absolute().parents) if parent.is_dir())
    free = shutil.disk_usage(there).free
    begun = sum(path.stat().st_size for path in there.glob("*.partial")) if there == directory else 0
    needed = sum(each.file.bytes for each in missing) - begun
    images, total = sum(each.file.images for each in work), sum(each.file.bytes for each in work)
    file = work[0].file
    if is_first_rank():
        print(
            f"{directory}: {len(work):,} shards, {images:,} images of {file.tokens} x {file.width} {file.dtype}, "
            f"{_size(total)}; {len(missing):,} shards and {_size(max(needed, 0))} are to be done, {_size(free)} free",
            file=sys.stderr,
        )
    if needed > free:
        raise ValueError(
            f"{directory} needs {_size(needed)} more and its disk has {_size(free)} free: name a directory with more "
            f"room" + (", or dtype=bfloat16." if file.dtype == "float32" else ".")
        )


def _size(number: int) -> str:
    return f"{number / 1e9:,.1f} GB" if number >= 1e9 else f"{number / 1e6:,.1f} MB"
