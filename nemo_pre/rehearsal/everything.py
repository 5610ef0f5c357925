"""``nemo-pre rehearse all``: every recipe, into the record and its table."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from nemo_pre.compat.versions import check_nemo
from nemo_pre.config.compose import compose_run
from nemo_pre.launch.ranks import RankFailure
from nemo_pre.options import Count, PathText
from nemo_pre.planner.chunks import num_chunks
from nemo_pre.rehearsal import record
from nemo_pre.rehearsal.rehearse import default_jobs, tell
from nemo_pre.rehearsal.run import Wishes, run_rehearsal

TOLD_OF_A_TRACEBACK = 1500  # characters, its end


def rehearse_all(
    only: Sequence[str] = (),
    out: PathText = "docs",
    layers: Count | None = None,
    messages: bool = True,
    jobs: Count | None = None,
    again: bool = False,
    confirm: bool = False,
) -> None:
    """Rehearse every recipe, one of them in FP8 too, and write out/rehearsals.json and out/rehearsals.md after each.

    What is recorded already, of the same configuration and as many layers, is passed over but for its plan, so that a
    rehearsal that was stopped goes on; only=NAME (or several names, bare) takes some recipes, layers=N cuts their
    depth, messages=false matches no calls, jobs=N ranks run at a time, again=true passes over nothing.
    confirm=true rehearses, at a layer a chunk, what is recorded and old because what rehearses is other code: where
    bytes, kernels, waits and calls are as recorded, the entry is of this code; else it stays old, and what differs is
    told.
    """
    check_nemo()  # the record is of NeMo's training
    names = record.runs()
    unknown = sorted(set(only) - set(names))
    if unknown:
        raise ValueError(f"{unknown[0]} is no recipe: choose of {', '.join(names)}.")
    entries = {name: each for name, each in record.read(out).items() if name in names}
    names_asked = list(only or names)
    if confirm:
        if again or layers is not None or not messages:
            raise ValueError(
                "confirm=true rehearses at a layer a chunk and matches calls: leave out again=, layers= and messages=."
            )
        _confirm(list(only) or [name for name in names if name in entries], entries, out, jobs)
        return
    started, done, failed = time.monotonic(), 0, []
    for number, name in enumerate(names_asked):
        config = compose_run(record.words_of(name))  # a second each
        whole = config.model.language.num_layers
        why = record.why_again(entries.get(name), config, min(layers or whole, whole), messages)
        if why is None and not again:
            entries[name] = record.replanned(entries[name], config)
            continue
        tell(f"{name} ({number + 1} of {len(names_asked)}): {why or 'asked for'}")
        try:
            wishes = Wishes(layers=layers, messages=messages, jobs=jobs or default_jobs())
            rehearsed = run_rehearsal(config, wishes, tell)
        except (RankFailure, ValueError) as error:
            failed.append(name)
            tell(f"  {error}")
            if isinstance(error, RankFailure) and error.traceback:
                tell(error.traceback[-TOLD_OF_A_TRACEBACK:])
            continue
        entries[name] = record.entry(config, rehearsed)
        record.write(out, entries)
        for sentence in rehearsed.problems:
            tell(f"  problem: {sentence}")
        done += 1
        left = (time.monotonic() - started) / done * (len(names_asked) - number - 1)
        tell(f"  {rehearsed.seconds:.0f} s; about {left / 60:.0f} minutes left, if none of them is passed over")
    record.write(out, entries)
    missing = [name for name in names if name not in entries]
    with_problems = [name for name in names_asked if name in entries and entries[name]["problems"]]
    if failed:
        raise RankFailure(f"{len(failed)} recipes could not be rehearsed: {', '.join(failed)}.")
    if with_problems:
        raise RankFailure(
            f"{len(with_problems)} of the rehearsed recipes have problems, which {out}/{record.TABLE} lists."
        )
    then = f", {len(missing)} missing; next: nemo-pre rehearse all out={out}" if missing else "; next: nemo-pre submit"
    print(f"{len(entries)} recipes in {out}/{record.TABLE}{then}")


def _confirm(asked: Sequence[str], entries: dict[str, Any], out: PathText, jobs: Count | None) -> None:
    """Confirm the entries that are asked for, and write the record after each.

    Raises:
        RankFailure: some could not be confirmed, for reasons that were told.
    """
    left, done = [], 0
    for number, name in enumerate(asked):
        config, entry = compose_run(record.words_of(name)), entries.get(name)
        why = record.why_unconfirmable(entry, config)
        if entry is not None and not why:
            if entry["instruments"] == record.instruments():
                continue
            tell(f"{name} ({number + 1} of {len(asked)}): {record.OTHER_CODE}")
            try:
                wishes = Wishes(layers=num_chunks(config.parallel), jobs=jobs or default_jobs())
                now = run_rehearsal(config, wishes, tell)
            except (RankFailure, ValueError) as error:
                why = [str(error)]
            else:
                why = record.why_unconfirmed(entry, now)
        if why or entry is None:
            left.append(name)
            tell(f"{name} is not confirmed: {'; '.join(sentence.rstrip('.') for sentence in why)}.")
            continue
        entries[name] = record.confirmed(entry, now)
        record.write(out, entries)
        done += 1
    record.write(out, entries)
    if left:
        raise RankFailure(
            f"{len(left)} of {len(asked)} entries could not be confirmed: nemo-pre rehearse all {' '.join(left)}"
            f" out={out} rehearses them anew."
        )
    print(f"{done} entries confirmed, {len(asked)} are of this code; next: nemo-pre rehearse all out={out}")
