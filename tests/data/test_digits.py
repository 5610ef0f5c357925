"""The digits dataset: its bytes, its split, and whether its answers are true of its pictures."""

from __future__ import annotations

import hashlib
import io
import json
import re
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_prep.digits import prepare
from nemo_pre.data.manifest import read_manifest
from nemo_pre.data.shards import ShardedSamples
from tests.data.prepared import PREPARE


def _bytes(directory: Path) -> dict[str, str]:
    files = sorted(path for path in directory.rglob("*") if path.is_file())
    return {str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def _records(directory: Path, split: str) -> list[dict]:
    samples = ShardedSamples(read_manifest(directory).shards[split])
    return [samples.read(i).record for i in range(len(samples))]


def test_the_bytes_depend_on_the_seed_but_not_on_the_number_of_processes(digits, tmp_path):
    prepare(tmp_path / "two", workers=2, **PREPARE)
    assert _bytes(tmp_path / "two") == _bytes(digits)
    prepare(tmp_path / "other", workers=1, **{**PREPARE, "seed": 4})
    differing = {name for name, digest in _bytes(tmp_path / "other").items() if digest != _bytes(digits).get(name)}
    assert {path.name for path in digits.glob("*.tar")} <= differing
    assert not any(name.startswith("tokenizer/") for name in differing)


def test_the_manifest_states_what_is_there(digits):
    manifest = json.loads((digits / "manifest.json").read_text())
    assert {split: content["samples"] for split, content in manifest["splits"].items()} == {"train": 320, "val": 80}
    for content in manifest["splits"].values():
        for shard in content["shards"]:
            assert (digits / shard["file"]).stat().st_size == shard["bytes"]
            assert hashlib.sha256((digits / shard["file"]).read_bytes()).hexdigest() == shard["sha256"]
            assert hashlib.sha256((digits / shard["index"]).read_bytes()).hexdigest() == shard["index_sha256"]
    assert not list(digits.glob("*.partial"))
    assert not (digits / "unfinished.json").exists()
    types = [kind for record in _records(digits, "train") for kind in record["question_types"]]
    assert manifest["splits"]["train"]["questions"] == {kind: types.count(kind) for kind in sorted(set(types))}
    assert set(types) == {"count", "place", "exists", "read", "larger", "text"}


def test_no_scan_is_in_both_splits(digits):
    scans = {
        split: {digit["scan"] for r in _records(digits, split) if "scene" in r for digit in r["scene"]["digits"]}
        for split in ("train", "val")
    }
    assert len(scans["train"]) > 300
    assert len(scans["val"]) > 50
    assert not scans["train"] & scans["val"]


def test_each_label_is_that_of_its_scan(digits):
    from sklearn.datasets import load_digits

    target = load_digits().target
    for record in _records(digits, "val"):
        for digit in record.get("scene", {"digits": []})["digits"]:
            assert target[digit["scan"]] == digit["digit"]


def _answer(question: str, digits: list[dict]) -> str:
    """The answer from labels and boxes alone; a second, slow opinion that shares no code with the generator."""
    labels = [digit["digit"] for digit in digits]
    named = [int(word) for word in re.findall(r"\d", question)]
    if question in ("how many digits are there?", "count the digits."):
        return str(len(digits))
    if question.startswith(("is there a", "do you see a")):
        return "yes" if named[0] in labels else "no"
    if question in ("read left to right.", "what does the row say?"):
        return " ".join(str(digit["digit"]) for digit in sorted(digits, key=lambda d: d["box"][0] + d["box"][2]))
    if question.startswith("which is larger"):
        heights = {d["digit"]: d["box"][3] - d["box"][1] for d in digits if d["digit"] in named}
        assert all(labels.count(label) == 1 for label in named)
        assert abs(heights[named[0]] - heights[named[1]]) >= 3
        return str(max(named, key=lambda label: heights[label]))
    place = re.fullmatch(r"(?:which digit|what) is at the (.*)\?", question)
    assert place, question
    name = place[1]
    third_y = 0 if "top" in name else 2 if "bottom" in name else 1
    third_x = 0 if "left" in name else 2 if "right" in name else 1
    there = [
        d["digit"]
        for d in digits
        if (d["box"][0] + d["box"][2]) / 2 // 16 == third_x and (d["box"][1] + d["box"][3]) / 2 // 16 == third_y
    ]
    assert len(there) == 1
    return str(there[0])


def _text_answer(question: str) -> str:
    a, *rest = [int(word) for word in re.findall(r"\d", question)]
    if "after" in question:
        return str(a + 1)
    if "before" in question:
        return str(a - 1)
    return str(a + rest[0] if "plus" in question else max(a, rest[0]))


def test_every_answer_is_right(digits):
    for record in _records(digits, "train") + _records(digits, "val"):
        values = [message["value"] for message in record["conversations"]]
        assert len(values) == 2 * len(record["question_types"]) == 4
        for question, answer, kind in zip(values[::2], values[1::2], record["question_types"], strict=True):
            question = question.removeprefix("<image>\n")
            if kind == "text":
                assert _text_answer(question) == answer, record
            else:
                assert _answer(question, record["scene"]["digits"]) == answer, record


def test_masks_agree_with_boxes_and_with_the_picture(digits):
    manifest = read_manifest(digits)
    samples = ShardedSamples(manifest.shards["train"])
    seen = 0
    for position in range(len(samples)):
        raw = samples.read(position)
        if raw.image is None:
            continue
        seen += 1
        picture = np.asarray(Image.open(io.BytesIO(raw.image)), dtype=float)
        mask = np.asarray(Image.open(io.BytesIO(samples.read_member(position, "mask.png"))))
        assert picture.shape == (48, 48, 3)
        assert mask.shape == (48, 48)
        assert sorted(set(mask.flat) - {0}) == [d["instance"] for d in raw.record["scene"]["digits"]]
        for digit in raw.record["scene"]["digits"]:
            ys, xs = np.nonzero(mask == digit["instance"])
            assert digit["box"] == [xs.min(), ys.min(), xs.max() + 1, ys.max() + 1]
            assert picture[ys, xs].mean() > picture[mask == 0].mean() + 20, "a digit stands out from the background"
    assert seen > 280


def test_webdataset_reads_the_shards(digits):
    import webdataset

    shards = [str(shard.path) for shard in read_manifest(digits).shards["val"]]
    found = list(webdataset.WebDataset(shards, shardshuffle=False))
    assert [json.loads(sample["json"])["id"] for sample in found] == [f"val-{i:06d}" for i in range(80)]
    assert all(sample["__key__"] == json.loads(sample["json"])["id"] for sample in found)
    with_image = [sample for sample in found if "png" in sample]
    assert len(with_image) > 60
    assert all(Image.open(io.BytesIO(s["mask.png"])).mode == "L" for s in with_image)


def test_complete_data_is_left_alone_and_damage_is_mended(digits_copy, capsys):
    expected = _bytes(digits_copy)
    before = (digits_copy / "train-00000.tar").stat().st_mtime_ns
    prepare(digits_copy, workers=1, **PREPARE)
    assert "nothing to do" in capsys.readouterr().err
    (digits_copy / "train-00002.tar").unlink()
    (digits_copy / "val-00000.index.json").write_text("[]")
    prepare(digits_copy, workers=1, **PREPARE)
    assert _bytes(digits_copy) == expected
    assert (digits_copy / "train-00000.tar").stat().st_mtime_ns == before


def test_an_interrupted_preparation_starts_over(digits, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "unfinished.json").write_text("{}")
    (out / "train-00000.tar.partial").write_bytes(b"half")
    (out / "train-00099.tar").write_bytes(b"of another size of dataset")
    prepare(out, workers=1, **PREPARE)
    assert _bytes(out) == _bytes(digits)


def test_a_directory_with_something_else_is_refused(digits, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="holds something else"):
        prepare(tmp_path, **PREPARE)
    assert (tmp_path / "notes.txt").read_text() == "mine"
    with pytest.raises(ValueError, match="holds other data"):
        prepare(digits, **{**PREPARE, "seed": 9})
    with pytest.raises(ValueError, match="num_scenes=1"):
        prepare(tmp_path / "new", num_scenes=1)


def test_preparing_imports_no_torch(tmp_path):
    program = (
        "import sys; from data_prep.digits import prepare; from nemo_pre.checks.data import check_data\n"
        f"prepare({str(tmp_path / 'few')!r}, num_scenes=8, workers=1); check_data({str(tmp_path / 'few')!r})\n"
        "heavy = {'torch', 'transformers', 'lightning', 'nemo', 'megatron'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr


def test_a_full_disk_is_one_sentence(tmp_path):
    """A limit on the size of files stands for it: every process of the pool meets it."""
    program = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000)); "
        "from nemo_pre.cli import main; sys.exit(main(sys.argv[1:]))"
    )
    words = ["data", "demo", f"out={tmp_path / 'out'}", "num_scenes=40", "scenes_per_shard=10", "workers=2"]
    done = subprocess.run([sys.executable, "-c", program, *words], capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stderr
    said = [line for line in done.stderr.splitlines() if line.startswith("nemo-pre: ")]
    assert said == [done.stderr.splitlines()[-1]] and "The disk is full" in said[0]
    assert "Traceback" not in done.stderr


def test_workers_do_not_outlive_a_preparation_that_is_killed(tmp_path):
    words = ["data", "demo", f"out={tmp_path / 'out'}", "num_scenes=200_000", "workers=2"]
    job = subprocess.Popen([sys.executable, "-m", "nemo_pre.cli", *words], stderr=subprocess.DEVNULL)
    try:
        _wait_for(lambda: list((tmp_path / "out").glob("*.partial")), 60)
        children = Path(f"/proc/{job.pid}/task").glob("*/children")
        started = {int(pid) for each in children for pid in each.read_text().split()}
        assert len(started) >= 2
    finally:
        job.kill()
        job.wait()
    _wait_for(lambda: not any(Path(f"/proc/{pid}").exists() for pid in started), 15)


def _wait_for(condition, seconds):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)
