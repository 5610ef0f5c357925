"""Thousands of broken datasets through the reader, image decoding, encoding and validation."""

from __future__ import annotations

import multiprocessing
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest

from tests.data_validate.fuzz_job import Job, Outcome, run

INPUTS = {"tar": 600, "record": 600, "image": 600, "index": 300, "manifest": 300}
PROCESSES = 2
SECONDS_PER_INPUT = 10  # a sound one takes hundredths; a busy machine some more


@pytest.fixture(scope="module")
def outcomes(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Outcome]:
    """A crash or a hang of a process shows here, as a broken pool."""
    jobs = [
        Job(mutation, range(half, number, PROCESSES), tmp_path_factory.mktemp("fuzz"), digits / "tokenizer")
        for mutation, number in INPUTS.items()
        for half in range(PROCESSES)
    ]
    with ProcessPoolExecutor(PROCESSES, multiprocessing.get_context("spawn")) as pool:
        return [outcome for found in pool.map(run, jobs) for outcome in found]


def shown(outcomes: list[Outcome]) -> str:
    return "\n".join(f"{o.mutation} {o.number}: {o.kind}, {o.seconds:.1f} s\n{o.detail}" for o in outcomes[:5])


def test_nothing_but_a_value_error_escapes_from_reading_or_validating(outcomes: list[Outcome]) -> None:
    escaped = [outcome for outcome in outcomes if outcome.kind == "escaped"]
    assert not escaped, f"{len(escaped)} of {len(outcomes)}, such as\n{shown(escaped)}"


def test_what_is_read_is_well_formed(outcomes: list[Outcome]) -> None:
    malformed = [outcome for outcome in outcomes if outcome.kind == "malformed"]
    assert not malformed, shown(malformed)


def test_no_input_takes_long(outcomes: list[Outcome]) -> None:
    slow = [outcome for outcome in outcomes if outcome.seconds > SECONDS_PER_INPUT]
    assert not slow, shown(slow)


def test_every_input_is_accounted_for(outcomes: list[Outcome]) -> None:
    counts = Counter(outcome.kind for outcome in outcomes)
    print(dict(counts), {name: dict(Counter(o.kind for o in outcomes if o.mutation == name)) for name in INPUTS})
    assert counts["equal"] + counts["different"] + counts["reported"] == len(outcomes) == sum(INPUTS.values())
    assert len({(outcome.mutation, outcome.number) for outcome in outcomes}) == len(outcomes)


@pytest.mark.parametrize("mutation", ["tar", "record", "image"])
def test_the_mutations_reach_beyond_the_first_check(outcomes: list[Outcome], mutation: str) -> None:
    """Each has inputs that are refused and inputs that are read all the same; of an index every change is found."""
    kinds = {outcome.kind for outcome in outcomes if outcome.mutation == mutation}
    assert "reported" in kinds and kinds & {"equal", "different"}


def test_validation_finds_whatever_the_reader_refuses(outcomes: list[Outcome]) -> None:
    missed = [outcome for outcome in outcomes if outcome.read and not outcome.validated]
    assert not missed, f"{len(missed)} of {len(outcomes)}, such as\n{shown(missed)}"
