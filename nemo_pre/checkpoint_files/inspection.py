"""Whether a checkpoint is what was saved, and safe to be loaded: asked before anything is.

On many ranks each reads its share of the bytes, and all get the same answer.
"""

from __future__ import annotations

import io
import json
import logging
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from datetime import timedelta
from itertools import count
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import Metadata

from nemo_pre.checkpoint_files.checksums import damage_of_part, stored_checksum
from nemo_pre.checkpoint_files.metadata import (
    COMMON,
    WEIGHTS,
    Wanted,
    check_backends,
    everything,
    places,
    read_metadata,
)
from nemo_pre.checkpoint_files.pickles import UnsafePickle, check_extra_state, load_plain
from nemo_pre.run_files.checkpoints import damage_of
from nemo_pre.run_files.checksums import damage_of_small_files, has_checksums

log = logging.getLogger(__name__)

EXTRA_STATE = "_extra_state"  # of modules whose state is no tensor, such as Transformer Engine's in FP8
THREADS = 8  # at most, of a process that reads alone
TIMEOUT = timedelta(hours=1)  # for another rank's share


@dataclass(frozen=True)
class Finding:
    """What an inspection found.

    Attributes:
        damage: which file is not as it was saved, empty if all are.
        danger: why the checkpoint is not to be loaded at all; a sentence, or empty.
        verified: whether there were checksums.
    """

    damage: str = ""
    danger: str = ""
    verified: bool = True


def damage_or_danger(checkpoint: Path, wanted: Wanted = everything, alone: bool = False) -> str:
    """What is wrong with a checkpoint, empty if nothing is. On all ranks of a job, each of which reads its share, or
    in a process by itself. A checkpoint without checksums is taken, and that is said.

    Args:
        wanted: which of its tensors are going to be read.
        alone: this process asks, and not every rank of a job.

    Raises:
        ValueError: it would run code.
    """
    found = inspect(checkpoint, wanted) if alone else inspect_together(checkpoint, wanted)
    if found.danger:
        raise UnsafePickle(found.danger)
    if not (found.damage or found.verified):
        log.warning("%s has no checksums: its bytes are taken as they are, not verified.", checkpoint)
    return found.damage


def inspect(checkpoint: Path, wanted: Wanted = everything, rank: int = 0, ranks: int = 1) -> Finding:
    """What is found in the share that ``rank`` of ``ranks`` reads; the small files are the first rank's."""
    weights = Path(checkpoint) / WEIGHTS
    try:
        damage = damage_of(Path(checkpoint)) or (damage_of_small_files(Path(checkpoint)) if rank == 0 else "")
        if damage:
            return Finding(damage)
        has_common = check_backends(weights)
        metadata = read_metadata(weights)
        if rank == 0 and has_common:
            with (weights / COMMON).open("rb") as file:
                load_plain(file, weights / COMMON)
        parts = list(_share(metadata, wanted, rank, ranks))
        known = [stored_checksum(place) is not None for _, _, place in parts]
        return Finding(_damage_of_parts(weights, parts), verified=has_checksums(Path(checkpoint)) and all(known))
    except UnsafePickle as error:
        return Finding(danger=str(error))
    except FileNotFoundError as error:
        return Finding(f"{_within(checkpoint, error.filename)} is missing")
    except OSError as error:
        return Finding(f"{_within(checkpoint, error.filename)} cannot be read ({error.strerror})")
    except ValueError as error:
        return Finding(str(error).replace(f"{checkpoint}{os.sep}", ""))


def _within(checkpoint: Path, path: Any) -> str:
    return str(path).replace(f"{checkpoint}{os.sep}", "")


def _share(metadata: Metadata, wanted: Wanted, rank: int, ranks: int) -> Iterator[tuple[str, bool, Any]]:
    """A rank's part of the bytes, in their order on the disk."""
    parts = sorted(places(metadata, wanted), key=lambda part: (part[2].relative_path, part[2].offset))
    total = sum(place.length for _, _, place in parts)
    done = 0
    for part in parts:
        if min(ranks - 1, done * ranks // max(total, 1)) == rank:
            yield part
        done += part[2].length


def _damage_of_parts(weights: Path, parts: list[tuple[str, bool, Any]]) -> str:
    cores = len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    with ThreadPoolExecutor(max(1, min(THREADS, cores))) as threads:
        found = threads.map(lambda part: damage_of_part(weights, part[0], part[2]), parts)
        damage = next(filter(None, found), "")
    for name, is_object, place in parts if not damage else []:
        if is_object:
            with (weights / place.relative_path).open("rb") as file:
                file.seek(place.offset)
                check_object(file.read(place.length), name, f"{weights / place.relative_path} ({name})")
    return damage


def check_object(content: bytes, name: str, path: str) -> None:
    """Refuse an object of a checkpoint that is no tensor: a pickle, in which, of a module's extra state, there may be
    another one that Transformer Engine unpickles.

    Args:
        content: what the checkpoint holds.
        name: the object's.
        path: for people.

    Raises:
        ValueError: it names what it does not need, or is damaged.
    """
    found = load_plain(io.BytesIO(content), path)
    if EXTRA_STATE in name:
        _check_states(found, path)


def _check_states(found: Any, path: str) -> None:
    if isinstance(found, torch.Tensor):
        if found.dtype == torch.uint8 and found.numel():
            check_extra_state(found.detach().cpu().contiguous().numpy().tobytes(), path)
    elif isinstance(found, dict):
        for value in found.values():
            _check_states(value, path)
    elif isinstance(found, list | tuple):
        for value in found:
            _check_states(value, path)


# --- on many ranks --------------------------------------------------------------------------------------------------

# By address, a store and the number of questions; kept, since the process groups of this job meet in the same.
_meetings: dict[tuple[str, str], tuple[Any, Iterator[int]]] = {}


def inspect_together(checkpoint: Path, wanted: Wanted = everything) -> Finding:
    """Inspect a checkpoint on every rank of a job, which all get the first damage that any of them met."""
    rank, ranks = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    if ranks == 1:
        return inspect(checkpoint, wanted)
    store, questions = _meeting()
    question = f"nemo-pre/checkpoint/{next(questions)}"
    mine = inspect(checkpoint, wanted, rank, ranks)
    store.set(f"{question}/{rank}", json.dumps(asdict(mine)))
    if rank == 0:
        everybody = [Finding(**json.loads(store.get(f"{question}/{other}"))) for other in range(ranks)]
        verdict = Finding(
            next((found.damage for found in everybody if found.damage), ""),
            next((found.danger for found in everybody if found.danger), ""),
            all(found.verified for found in everybody),
        )
        store.set(f"{question}/verdict", json.dumps(asdict(verdict)))
    return Finding(**json.loads(store.get(f"{question}/verdict")))


def _meeting() -> tuple[Any, Iterator[int]]:
    """Where the ranks meet before there is a process group: the store that it is going to use, which torch shares
    among all that ask for it in a process."""
    address = os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]
    if address not in _meetings:
        _meetings.clear()
        if torch.distributed.is_initialized():
            store = torch.distributed.distributed_c10d._get_default_store()
        else:
            store, *_ = next(torch.distributed.rendezvous("env://", timeout=TIMEOUT))
        _meetings[address] = store, count()
    return _meetings[address]
