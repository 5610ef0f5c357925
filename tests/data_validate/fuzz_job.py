"""A process that reads and validates mutated datasets, and tells what became of each."""

from __future__ import annotations

import contextlib
import faulthandler
import io
import random
import shutil
import time
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_prep.validate.check import check
from data_prep.validate.content import Limits
from tests.data_validate.mutations import MUTATIONS
from tests.data_validate.small import write

HANG_SECONDS = 60  # then the process ends itself, in whatever code it is


@dataclass(frozen=True)
class Job:
    mutation: str
    numbers: range
    directory: Path
    tokenizer: Path


@dataclass(frozen=True)
class Outcome:
    """``read`` and ``validated`` say whether reader and validation reported something; ``escaped`` is a traceback."""

    mutation: str
    number: int
    kind: str  # equal | different | reported | escaped | malformed
    read: bool = False
    validated: bool = False
    seconds: float = 0.0
    detail: str = ""


def run(job: Job) -> list[Outcome]:
    reading = _preprocessing(job.tokenizer)
    sound = write(job.directory / "sound")
    original, complaints = _read(sound, reading)
    assert not complaints and not _validate(sound, job.tokenizer), complaints
    outcomes = []
    for number in job.numbers:
        directory = job.directory / str(number)
        shutil.copytree(sound, directory)
        MUTATIONS[job.mutation](directory, random.Random(f"{job.mutation} {number}"))
        faulthandler.dump_traceback_later(HANG_SECONDS, exit=True)
        start = time.monotonic()
        outcomes.append(_outcome(job, number, directory, reading, original, start))
        faulthandler.cancel_dump_traceback_later()
        shutil.rmtree(directory)
    return outcomes


def _outcome(job: Job, number: int, directory: Path, reading: Any, original: dict, start: float) -> Outcome:
    try:
        items, complaints = _read(directory, reading)
        findings = _validate(directory, job.tokenizer)
    except Exception:
        return Outcome(job.mutation, number, "escaped", seconds=_since(start), detail=traceback.format_exc())
    malformed = [where for where, item in items.items() if not _is_well_formed(item, reading)]
    if malformed:
        return Outcome(job.mutation, number, "malformed", seconds=_since(start), detail=f"{malformed}")
    if complaints or findings:
        kind = "reported"
    else:
        same = items.keys() == original.keys() and all(_are_equal(items[where], original[where]) for where in items)
        kind = "equal" if same else "different"
    detail = f"read: {complaints[:3]}\nvalidated: {findings[:3]}"
    return Outcome(job.mutation, number, kind, bool(complaints), bool(findings), _since(start), detail)


def _since(start: float) -> float:
    return time.monotonic() - start


def _preprocessing(tokenizer: Path) -> Any:
    from nemo_pre.data.preprocessing import build_preprocessing
    from nemo_pre.data.tokenizer import load_tokenizer
    from tests.data.prepared import digits_config

    config = digits_config(tokenizer)
    config.data.sequence_length = 100_000  # nothing is cut: how long a sample may be is no question of its bytes
    return build_preprocessing(config, load_tokenizer(tokenizer))


def _read(directory: Path, reading: Any) -> tuple[dict[tuple[str, int], Any], list[str]]:
    """Every sample as training gets it, and what was refused; only a ValueError is a refusal."""
    from nemo_pre.data.dataset import ConversationDataset
    from nemo_pre.data.manifest import read_manifest

    items, complaints = {}, []
    try:
        manifest = read_manifest(directory)
    except ValueError as error:
        return {}, [str(error)]
    for split in ("train", "val"):
        try:
            dataset = ConversationDataset(manifest, split, reading)
        except ValueError as error:
            complaints.append(str(error))
            continue
        for position in range(len(dataset)):
            try:
                items[split, position] = dataset[position]
            except ValueError as error:
                complaints.append(str(error))
    return items, complaints


def _validate(directory: Path, tokenizer: Path) -> list[str]:
    with contextlib.redirect_stderr(io.StringIO()):  # its progress
        try:
            report = check(directory, Limits(tokenizer=str(tokenizer)), workers=1)
        except ValueError as error:
            return [str(error)]
    return [f"{finding.reason} {finding.shard} {finding.key}: {finding.detail}" for finding in report.findings]


def _images(item: Any) -> Any:
    """The tiles of all images of an item in one tensor."""
    import torch

    return torch.cat(item.images) if item.images else torch.empty(0)


def _is_well_formed(item: Any, reading: Any) -> bool:
    import torch

    known = all(token == -200 or 0 <= token < len(reading.tokenizer) for token in item.tokens)
    targets = all(label == -100 or 0 <= label < len(reading.tokenizer) for label in item.labels)
    images = _images(item)
    tile = 3 * reading.image_size**2
    finite = images.dtype == torch.float32 and bool(torch.isfinite(images).all())
    whole = images.numel() % tile == 0 and bool(images.numel()) == (-200 in item.tokens)
    return known and targets and len(item.tokens) == len(item.labels) and finite and whole


def _are_equal(one: Any, other: Any) -> bool:
    import torch

    texts = (one.key, one.tokens, one.labels) == (other.key, other.tokens, other.labels)
    return texts and torch.equal(_images(one), _images(other))
