"""The record of all recipes' rehearsals: a JSON file, and the table that is made of it.

An entry is as old as the code while these are as they were: what the recipe sets (a digest), the code that rehearses
(a digest of its statements), the plan, and what a rehearsal at a layer a chunk finds. The first three are compared at
every test, for every entry; the last for a few recipes, and for all by ``make rehearse``: a commit that changes
nothing that can be measured leaves the record valid, and one that does makes it old whatever file it touches.
"""

from __future__ import annotations

import ast
import hashlib
import json
import os
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

import recipes
from nemo_pre.config.derived import world_size
from nemo_pre.config.run import RunConfig
from nemo_pre.rehearsal.compare import gib, outside_tolerance, planned_memory
from nemo_pre.rehearsal.found import Found
from nemo_pre.rehearsal.run import Rehearsed, as_rehearsed, rehearsable

FILE, TABLE = "rehearsals.json", "rehearsals.md"
FORMAT = 2
WITH = "+"  # between a recipe and a choice of precision that is rehearsed beside its own
IN_FP8, FP8_RECIPES = "siglip2_qwen25_7b_stage2_full_pre", ("delayed", "tensorwise", "blockwise")
# What stands for the device, for other ranks and for kernels, and what counts: not what tells of it.
INSTRUMENTS = (
    "compat/rehearsed_*.py",
    *(
        f"rehearsal/{name}.py"
        for name in ("batches", "device", "groups", "memory", "rank", "seams", "shrink", "watch", "with_nemo")
    ),
)
APART = 0.002  # by which bytes of two rehearsals of the same code may differ: garbage is collected when it is
OTHER_CODE = "what rehearses is other code"  # the one reason that a rehearsal at a layer a chunk can clear up
AGAIN = "run nemo-pre rehearse all, which rehearses what is missing or old"


def read(directory: str | Path) -> dict[str, Any]:
    """The entries by recipe; none where there is no record yet.

    Raises:
        ValueError: the file is not a record.
    """
    path = Path(directory) / FILE
    if not path.exists():
        return {}
    try:
        raw = json.loads(path.read_text())
        if raw["format"] != FORMAT:
            raise ValueError(f"it states format {raw['format']!r}")
        return dict(raw["recipes"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not a record of rehearsals ({error!r}): remove it and {AGAIN}.") from error


def write(directory: str | Path, entries: Mapping[str, Any]) -> None:
    """Write the record and its table, each whole or not at all."""
    ordered = {name: entries[name] for name in sorted(entries)}
    text = json.dumps({"format": FORMAT, "recipes": ordered}, indent=1) + "\n"
    for name, content in ((FILE, text), (TABLE, table(ordered))):
        path = Path(directory) / name
        path.parent.mkdir(parents=True, exist_ok=True)
        fresh = path.with_name(f".{name}.{os.getpid()}")
        fresh.write_text(content)
        fresh.replace(path)


# --- runs -----------------------------------------------------------------------------------------------------------


def runs() -> list[str]:
    """What is to be recorded: every recipe, and one in FP8, scaled in each way."""
    return [*recipes.choices("experiment"), *(f"{IN_FP8}{WITH}fp8_{kind}" for kind in FP8_RECIPES)]


def words_of(run: str) -> list[str]:
    """The words that compose a recorded run."""
    name, _, precision = run.partition(WITH)
    return [f"experiment={name}", *([f"precision={precision}"] if precision else [])]


# --- entries --------------------------------------------------------------------------------------------------------


def digest(config: RunConfig) -> str:
    """The first 16 hex digits of the SHA-256 of the options that a run sets to other values than their defaults, but
    for where it lies and what it is called: an option that is new, at its default, makes no entry old."""
    values = _set(asdict(config), asdict(RunConfig()))
    for name in ("name", "output_dir", "experiment", "init_from", "vision_from", "dry_run", "resume", "platform"):
        values.pop(name, None)
    return hashlib.sha256(json.dumps(values, sort_keys=True, default=str).encode()).hexdigest()[:16]


def _set(values: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in values.items():
        default = defaults.get(name)
        if isinstance(value, Mapping) and isinstance(default, Mapping):
            value, default = _set(value, default), {}
        if value != default:
            found[name] = value
    return found


@cache
def instruments() -> str:
    """The first 16 hex digits of the SHA-256 of the code that rehearses, without its comments and docstrings."""
    package, digest_of = Path(__file__).parents[1], hashlib.sha256()
    for pattern in INSTRUMENTS:
        for path in sorted(package.glob(pattern)):
            tree = ast.parse(path.read_text())
            for node in ast.walk(tree):
                body = getattr(node, "body", None)
                if isinstance(body, list) and body and _is_docstring(body[0]):
                    del body[0]
            digest_of.update(ast.dump(tree).encode())
    return digest_of.hexdigest()[:16]


def _is_docstring(node: ast.AST) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)


def entry(config: RunConfig, rehearsed: Rehearsed) -> dict[str, Any]:
    """What is recorded of a recipe's rehearsal."""
    met = rehearsed.met
    return {
        "commit": commit(),
        "confirmed": None,
        "instruments": instruments(),
        "config": digest(config),
        "layers": rehearsed.layers,
        "of_layers": rehearsed.all_layers,
        "micro_batches": rehearsed.micro_batches,
        "ranks": [
            {
                "place": str(beside.place),
                "stage": beside.place.stage + 1,
                "peak": beside.peak,
                "planned": beside.plan,
                "over": round(beside.over, 5),
                "state": found.state_bytes,
                "held_more_after_a_step": found.growth,
                "host_waits": sum(number for _, number in found.waits),
                "kernels": found.kernels,
                "tflop": round(found.flops / 1e12, 3),
            }
            for beside, found in zip(rehearsed.besides, rehearsed.found, strict=True)
        ],
        "messages": None if met is None else met.messages,
        "collectives": None if met is None else met.collectives,
        "met_ranks": rehearsed.met_ranks,
        "at_a_layer_a_chunk": [facts(found) for found in rehearsed.cut],
        "problems": rehearsed.problems,
        "not_covered": rehearsed.not_covered,
        "verified_on_a_gpu": None,
    }


def facts(found: Found) -> dict[str, Any]:
    """What a rank's rehearsal at a layer a chunk is recognised by."""
    steps = [call for call in found.log.calls if call.phase == "2" and len(call.ranks) > 1]
    return {
        "rank": found.rank,
        "peak": found.peak,
        "state": found.state_bytes,
        "kernels": found.kernels,
        "flops": found.flops,
        "host_waits": sum(number for _, number in found.waits),
        "calls": len(steps),
        "call_bytes": sum(call.bytes for call in steps),
    }


def differences(recorded: Sequence[Mapping[str, Any]], now: Sequence[Mapping[str, Any]]) -> list[str]:
    """Where two rehearsals at a layer a chunk differ, rank by rank; one sentence each."""
    found, before = [], {each["rank"]: each for each in recorded}
    found += [f"rank {rank} is recorded only" for rank in sorted(set(before) - {each["rank"] for each in now})]
    for each in now:
        old = before.get(each["rank"])
        if old is None:
            found.append(f"rank {each['rank']} is not recorded")
            continue
        for name, value in each.items():
            apart = APART * max(abs(value), abs(old.get(name, 0))) if name in ("peak", "state") else 0
            if abs(value - old.get(name, 0)) > apart:
                found.append(f"rank {each['rank']}: {name} was {old.get(name)} and is {value}")
    return found


def plan_differs(recorded: Mapping[str, Any], config: RunConfig) -> list[str]:
    """Where the plan is another than when the recipe was rehearsed; one sentence for each rank."""
    run = as_rehearsed(rehearsable(config)[0], recorded["layers"])
    found = []
    for rank in recorded["ranks"]:
        now = sum(planned_memory(run, rank["stage"] - 1).values())
        if now != rank["planned"]:
            found.append(f"{rank['place']} is planned as {now} bytes, and was as {rank['planned']}.")
    return found


def replanned(recorded: Mapping[str, Any], config: RunConfig) -> dict[str, Any]:
    """The entry with the plan as it is now beside the peaks that were rehearsed: it is arithmetic."""
    run, ranks, problems = as_rehearsed(rehearsable(config)[0], recorded["layers"]), [], list(recorded["problems"])
    for rank in recorded["ranks"]:
        before = outside_tolerance(rank["place"], rank["planned"], rank["peak"])
        planned = sum(planned_memory(run, rank["stage"] - 1).values())
        problems = [sentence for sentence in problems if sentence not in before]
        problems += outside_tolerance(rank["place"], planned, rank["peak"])
        ranks.append({**rank, "planned": planned, "over": round(planned / rank["peak"] - 1, 5)})
    return {**recorded, "ranks": ranks, "problems": problems}


def why_again(recorded: Mapping[str, Any] | None, config: RunConfig, layers: int, messages: bool = True) -> str | None:
    """Why a recipe is rehearsed again, without rehearsing it; None: it need not be.

    Args:
        layers: decoder layers that are asked for.
        messages: whether calls are to be matched.
    """
    if recorded is None:
        return "not recorded"
    if recorded["config"] != digest(config):
        return "its configuration is another"
    if recorded["instruments"] != instruments():
        return OTHER_CODE
    if recorded["layers"] < layers:
        return f"recorded with {recorded['layers']} layers"
    if messages and recorded["messages"] is None and world_size(config.parallel) > 1:
        return "recorded without messages"
    return None


def why_unconfirmable(recorded: Mapping[str, Any] | None, config: RunConfig) -> list[str]:
    """Why no rehearsal at a layer a chunk can confirm an entry, of any depth, without rehearsing it; none: it may."""
    why = why_again(recorded, config, layers=1)
    if recorded is None or why not in (None, OTHER_CODE):
        return [str(why)]
    if not recorded["at_a_layer_a_chunk"]:
        return ["recorded without messages"]
    return plan_differs(recorded, config)


def why_unconfirmed(recorded: Mapping[str, Any], now: Rehearsed) -> list[str]:
    """Where a rehearsal at a layer a chunk found something else than is recorded; one sentence each."""
    found = differences(recorded["at_a_layer_a_chunk"], [facts(each) for each in now.cut])
    met = now.met
    for name, value in (
        ("messages", None if met is None else met.messages),
        ("collectives", None if met is None else met.collectives),
        ("met_ranks", now.met_ranks),
    ):
        if value != recorded[name]:
            found.append(f"{name} were {recorded[name]} and are {value}")
    return [*found, met.problem] if met is not None and met.problem is not None else found


def confirmed(recorded: Mapping[str, Any], now: Rehearsed) -> dict[str, Any]:
    """The entry as one of the code as it is, which found the same at a layer a chunk: what was rehearsed at its depth,
    and the commit that did, stay."""
    return {**recorded, "confirmed": commit(), "instruments": instruments(), "not_covered": now.not_covered}


def commit() -> str:
    """The commit of the code, with a plus where files differ from it; ``unknown`` outside of a clone."""
    where = Path(__file__).parents[2]

    def git(*words: str) -> str:
        done = subprocess.run(["git", "-C", str(where), *words], capture_output=True, text=True, check=False)
        return done.stdout.strip() if done.returncode == 0 else ""

    try:
        head = git("rev-parse", "--short=10", "HEAD")
        changed = git("status", "--porcelain", "--untracked-files=no", "--", "nemo_pre", "recipes")
    except OSError:
        return "unknown"
    return (head + "+" * bool(changed)) if head else "unknown"


def of_commit(recorded: Mapping[str, Any]) -> str:
    """Which commit rehearsed an entry, which confirmed it if one did, and whether what rehearses is other code."""
    by = recorded.get("confirmed")  # entries of before there were confirmations have no such word
    confirmation = "" if by is None else f", confirmed by {by}"
    older = "" if recorded["instruments"] == instruments() else ", older than what rehearses"
    return recorded["commit"] + confirmation + older


# --- the table ------------------------------------------------------------------------------------------------------

HEADER = """# Rehearsals of the recipes

Generated by `nemo-pre rehearse all` from [rehearsals.json](rehearsals.json); [rehearsing.md](rehearsing.md) says what
the figures are and what a rehearsal cannot see. Peaks are GiB of a rank, with Adam's moments, without the libraries'
buffers; *plan* is what `nemo-pre plan` says without them, and by how much it is above (+) or under (-) the rehearsed
peak. *Layers* are the decoder layers that were rehearsed: with fewer than all of them the peak is not the run's.
*Met* are the messages and collectives of all stages, two replicas and a second tensor-parallel rank that found each
other, at a layer a chunk. A commit that *confirmed* an entry found the same at a layer a chunk as the one before it,
which rehearsed it as deep as is said. `NAME+fp8_...` is the recipe in FP8. Nothing here was measured on a GPU.

| recipe | layers | rank | peak | plan | | host waits a step | met | problems | commit | verified on a GPU |
|---|---|---|---|---|---|---|---|---|---|---|
"""


def table(entries: Mapping[str, Any]) -> str:
    """The Markdown page of the record."""
    rows = []
    for name, each in entries.items():
        met = "" if each["messages"] is None else f"{each['messages']} + {each['collectives']}"
        verified = each["verified_on_a_gpu"] or "never"
        for number, rank in enumerate(each["ranks"]):
            first = number == 0
            cells = [
                name if first else "",
                f"{each['layers']} of {each['of_layers']}" if first else "",
                rank["place"],
                gib(rank["peak"]),
                gib(rank["planned"]),
                f"{rank['over']:+.1%}",
                str(rank["host_waits"]),
                met if first else "",
                str(len(each["problems"])) if first else "",
                of_commit(each) if first else "",
                verified if first else "",
            ]
            rows.append("| " + " | ".join(cells) + " |")
    problems = [f"- {name}: {sentence}" for name, each in entries.items() for sentence in each["problems"]]
    not_covered = sorted({sentence for each in entries.values() for sentence in each["not_covered"]})
    sections = [HEADER + "\n".join(rows)]
    if problems:
        sections.append("## Problems\n\n" + "\n".join(problems))
    missing = [name for name in runs() if name not in entries]
    if missing:
        sections.append("## Not rehearsed yet\n\n" + "\n".join(f"- {name}" for name in missing))
    sections.append("## Not covered\n\n" + "\n".join(f"- {sentence}" for sentence in not_covered))
    return "\n\n".join(sections) + "\n"
