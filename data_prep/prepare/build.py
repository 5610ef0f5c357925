"""Prepares a dataset: opens the sources, draws the order, writes the chunks in parallel, and the manifest last."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from data_prep.energon import is_energons, write_metadata
from data_prep.prepare.blend import Rows, Source, open_rows
from data_prep.prepare.chunks import Job
from data_prep.prepare.manifest import DROPPED, build_manifest, describe_request, read_finished
from data_prep.prepare.parquet import ParquetRows
from data_prep.prepare.plan import SPLITS, Chunk, Options, chunk_of, chunks_of, draw_order
from data_prep.prepare.repairs import offered
from data_prep.prepare.workplace import Workplace
from data_prep.shards import is_whole, write_whole
from nemo_pre.data.manifest import MANIFEST
from nemo_pre.data.progress import Progress
from nemo_pre.orphans import end_with_the_pool

Task = TypeVar("Task")
TOLERATED_LOSS = 0.01  # of the samples


def build(
    name: str, sources: list[Source], options: Options, out: str | Path, on_error: str, workers: int | None
) -> dict[str, Any]:
    """Fills ``out`` and returns the manifest. Raises ValueError."""
    if on_error not in ("drop", "raise"):
        raise ValueError(f"on_error={on_error} is neither drop nor raise")
    if workers is not None and workers < 1:
        raise ValueError(f"workers={workers}: give at least 1")
    workplace = Workplace(Path(out).resolve())
    finished = _inspect(workplace)
    try:
        with workplace.opened():
            return _fill(name, sources, options, workplace, finished, on_error == "raise", workers)
    except PermissionError as error:
        raise ValueError(f"{error.filename} may not be read or written: change its permissions") from error
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise ValueError(
            f"the disk of {out} is full: make room and run the same again, which keeps the shards that are finished"
        ) from error


def _inspect(workplace: Workplace) -> dict[str, Any] | None:
    """The manifest if ``out`` was once completed, None if it is to be filled. Raises ValueError: something else."""
    out = workplace.out
    if out.exists() and not out.is_dir():
        raise ValueError(f"out={out} is a file; name a directory")
    finished = read_finished(out)
    if finished is not None and "sources" not in finished:
        raise ValueError(f"out={out} holds data that was not prepared from a source; name another out")
    if finished is None and not workplace.folder.is_dir() and out.exists() and any(out.iterdir()):
        raise ValueError(f"out={out} holds something else; name a new or an empty directory")
    return finished


def _fill(
    name: str,
    sources: list[Source],
    options: Options,
    workplace: Workplace,
    finished: dict[str, Any] | None,
    raise_errors: bool,
    workers: int | None,
) -> dict[str, Any]:
    out = workplace.out
    rows = [open_rows(source, workplace.source_files(number)) for number, source in enumerate(sources)]
    request = json.loads(json.dumps(describe_request(name, sources, rows, options)))
    if finished is not None and {key: finished.get(key) for key in request} != request:
        workplace.remove()
        raise ValueError(f"out={out} holds other data or was prepared with other options; remove it or name another")
    order = draw_order(sources, [source.rows for source in rows], options)
    workplace.claim(request)
    workplace.clear_staged()
    chunks = chunks_of(order, options)
    if finished is None:
        missing = [chunk for chunk in chunks if not workplace.is_finished(chunk.name)]
    else:
        missing = _damaged(out, finished, chunks)
        if not missing and is_energons(out, finished["splits"]):
            workplace.remove()
            _say(f"{out} already holds these {sum(map(len, order.values())):,} samples; nothing to do")
            _say_losses(finished, out)
            return finished
    _say(f"{len(chunks) - len(missing)} of {len(chunks)} chunks are there; writing {len(missing)}")
    if missing:
        names = tuple(source.name for source in sources)
        job = Job(workplace, names, tuple(rows), options, raise_errors, _checksums(finished) if finished else None)
        _save_order(workplace, rows, order)
        _unpack(job, missing, order, workers)
        progress = Progress("samples", sum(chunk.stop - chunk.start for chunk in missing))
        _run(job, job.write, missing, progress, workers)

    manifest = finished or build_manifest(request, workplace, chunks)
    write_metadata(out, manifest["splits"])
    write_whole(out / MANIFEST, (json.dumps(manifest, indent=1) + "\n").encode())
    workplace.remove()
    counts = ", ".join(f"{manifest['splits'][split]['samples']:,} {split}" for split in SPLITS)
    lost = ", ".join(f"{count:,} {reason}" for reason, count in manifest["dropped"].items())
    mended = ", ".join(f"{count:,} {repair}" for repair, count in manifest["repaired"].items())
    _say(
        f"wrote {counts} samples to {out}"
        + (f"; repaired {mended}" if mended else "")
        + (f"; dropped {lost} (see dropped.jsonl)" if lost else "")
    )
    _say_losses(manifest, out)
    return manifest


def _say_losses(manifest: dict[str, Any], out: Path) -> None:
    """What is lost, where it is more than anyone would overlook knowingly."""
    dropped = manifest["dropped"]
    lost = sum(dropped.values())
    total = lost + sum(manifest["splits"][split]["samples"] for split in SPLITS)
    if lost <= TOLERATED_LOSS * total:
        return
    shares = ", ".join(
        f"{count / total:.2%} {reason}" for reason, count in sorted(dropped.items(), key=lambda item: -item[1])
    )
    repairs = [name for name in offered(dropped) if name not in manifest["parameters"]["repair"]]
    cure = f"; repair={','.join(repairs)} may keep some (see --help)" if repairs else ""
    _say(f"LOST {lost:,} of {total:,} samples, {lost / total:.1%}: {shares}. {out / DROPPED} lists them{cure}.")


def _damaged(out: Path, finished: dict[str, Any], chunks: list[Chunk]) -> list[Chunk]:
    """The chunks of a completed directory of which a shard is missing or cut."""
    entries = [entry for split in finished["splits"].values() for entry in split["shards"]]
    broken = {chunk_of(entry["file"]) for entry in entries if not is_whole(out, entry)}
    return [chunk for chunk in chunks if chunk.name in broken]


def _checksums(finished: dict[str, Any]) -> dict[str, str]:
    return {entry["file"]: entry["sha256"] for split in finished["splits"].values() for entry in split["shards"]}


def _save_order(workplace: Workplace, rows: Sequence[Rows], order: dict[str, np.ndarray]) -> None:
    """The order of each split, and the rows taken of each source that is to be unpacked."""
    for split, samples in order.items():
        np.save(workplace.order_file(split), samples)
    taken = np.unique(np.concatenate(list(order.values())))
    starts = np.cumsum([0, *(source.rows for source in rows)])
    for number, source in enumerate(rows):
        if isinstance(source, ParquetRows):
            first, last = np.searchsorted(taken, starts[number : number + 2])
            np.save(workplace.taken_file(number), taken[first:last] - starts[number])


def _unpack(job: Job, missing: list[Chunk], order: dict[str, np.ndarray], workers: int | None) -> None:
    """Makes the rows of the ``missing`` chunks readable one by one."""
    wanted = np.unique(np.concatenate([order[chunk.split][chunk.start : chunk.stop] for chunk in missing]))
    starts = np.cumsum([0, *(source.rows for source in job.rows)])
    tasks, num_rows = [], 0
    for number, source in enumerate(job.rows):
        if isinstance(source, ParquetRows):
            groups = source.groups_of(wanted - starts[number])
            groups = [group for group in groups if not source.is_unpacked(group)]
            tasks += [(number, group) for group in groups]
            num_rows += sum(len(job.rows_taken(number, group)) for group in groups)
    _run(job, job.unpack, tasks, Progress("unpacked rows", num_rows), workers)


# --- processes ------------------------------------------------------------------------------------------------------


def _run(job: Job, work: Callable[[Task], int], tasks: list[Task], progress: Progress, workers: int | None) -> None:
    """Does all ``tasks``; the first error stops the rest."""
    workers = min(workers or len(os.sched_getaffinity(0)), len(tasks))
    if workers <= 1:
        for task in tasks:
            progress.advance(work(task))
        return
    waiting = iter(tasks)
    pool = ProcessPoolExecutor(
        workers, multiprocessing.get_context("spawn"), initializer=_receive, initargs=(job, work.__name__)
    )
    try:
        running: set[Future[int]] = set()
        while True:
            running |= {pool.submit(_do, task) for task in islice(waiting, 2 * workers - len(running))}
            if not running:
                break
            done, running = wait(running, return_when=FIRST_COMPLETED)
            for future in done:
                progress.advance(future.result())
    except BrokenProcessPool as error:
        raise ValueError(
            "a worker process was killed, for want of memory most likely: run the same again with fewer workers"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


_work: Callable[[Any], int]  # of a worker process: what it was started for


def _receive(job: Job, method: str) -> None:
    global _work
    _work = getattr(job, method)
    end_with_the_pool()  # another run may already be at the same chunk


def _do(task: Any) -> int:
    return _work(task)


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
