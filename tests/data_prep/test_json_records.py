"""Records of a JSON array are found at the same bytes wherever the blocks of the file are cut."""

from __future__ import annotations

import hashlib
import json
import random
import subprocess
import sys
import tracemalloc

import pytest

from data_prep.prepare import json_records
from data_prep.prepare.json_records import find_records


def _random_value(rng: random.Random, depth: int = 0):  # type: ignore[no-untyped-def]
    kind = rng.randrange(7 if depth < 3 else 5)
    if kind == 5:
        return [_random_value(rng, depth + 1) for _ in range(rng.randrange(4))]
    if kind == 6:
        return {rng.choice(["id", "wert", "日"]): _random_value(rng, depth + 1) for _ in range(rng.randrange(3))}
    return [rng.randrange(10**6), rng.random(), None, True, rng.choice(['{"[\\\n', "naïve 日本 \U0001f600", "]", ""])][
        kind
    ]


@pytest.mark.parametrize("block", [1, 2, 3, 7, 64, 1 << 20])
def test_random_arrays_give_their_records_at_any_block_size(tmp_path, monkeypatch, block):
    monkeypatch.setattr(json_records, "BLOCK", block)
    rng = random.Random(block)
    for round in range(20):
        values = [_random_value(rng) for _ in range(rng.randrange(8))]
        text = json.dumps(values, ensure_ascii=rng.random() < 0.5, indent=rng.choice([None, 1]))
        content = rng.choice([b"", b"\xef\xbb\xbf", b" \n"]) + text.encode() + rng.choice([b"", b"\n"])
        file = tmp_path / f"{round}.json"
        file.write_bytes(content)
        places, digest = find_records(file)
        found = [
            json.loads(content[start : start + size]) for start, size in zip(places[::2], places[1::2], strict=True)
        ]
        assert found == values
        assert digest == hashlib.sha256(content).hexdigest()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('[{"id": 1}, {"id": ', "record 1, at byte 12"),
        ('[{"id": 1}, {"id": x}, {"id": 3}]', "record 1, at byte 12"),
        ('[{"id": 1} {"id": 2}]', "instead of a comma"),
        ("hello", "neither a JSON array nor JSON lines"),
        ("", "neither a JSON array nor JSON lines"),
    ],
)
def test_an_array_that_cannot_be_read_is_refused_with_the_place(tmp_path, content, message):
    (tmp_path / "x.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        find_records(tmp_path / "x.json")


def _many_records(file, count: int):  # type: ignore[no-untyped-def]
    turn = [{"from": "human", "value": "What? " * 50}, {"from": "gpt", "value": "This. " * 100}]
    with file.open("w") as out:
        out.write("[")
        for number in range(count):
            out.write((", " if number else "") + json.dumps({"id": number, "conversations": turn}))
        out.write("]")


def test_finding_records_takes_a_few_blocks_of_memory_for_any_file(tmp_path, monkeypatch):
    monkeypatch.setattr(json_records, "BLOCK", 1 << 20)
    _many_records(tmp_path / "x.json", 50_000)
    size = (tmp_path / "x.json").stat().st_size
    tracemalloc.start()
    try:
        places, _ = find_records(tmp_path / "x.json")
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(places) == 100_000 and size > 45e6
    assert peak < 12e6


PREPARE = """
import sys
from data_prep.prepare import prepare
prepare(sys.argv[1], sys.argv[2], val_samples=10, shard_samples=1000, workers=1)
print(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))  # peak, in kB
"""


def test_a_preparation_takes_no_more_memory_for_five_times_the_records(tmp_path):
    peaks = []
    for count in (10_000, 50_000):
        _many_records(tmp_path / f"{count}.json", count)
        words = [sys.executable, "-c", PREPARE, str(tmp_path / f"{count}.json"), str(tmp_path / f"out-{count}")]
        done = subprocess.run(words, capture_output=True, text=True, check=True)
        peaks.append(int(done.stdout) * 1024)
    assert peaks[1] < 150e6
    assert peaks[1] - peaks[0] < 25e6, peaks  # the file grows by 38 MB, and its parsed records by more
