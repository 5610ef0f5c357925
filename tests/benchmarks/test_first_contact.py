"""The harness of the first contact keeps what there is, whatever a step does; the packer refuses what is too large."""

import json
import os
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest

from benchmarks.gpu import pack_upload
from benchmarks.gpu.first_contact import contact, kernels, memory, record, runs, surroundings
from benchmarks.gpu.first_contact.harness import Outcome
from benchmarks.gpu.first_contact.summary import SCREEN, WIDTH, summarise
from benchmarks.planned_memory import describe
from nemo_pre.planner.devices import DEVICES
from nemo_pre.rehearsal.record import digest

MISBEHAVING = (  # in this order
    "exits,segfaults,half_a_line,device_full,hangs,leaves,fills,floods,off,nan,silent,absent,good,later"
)


def harness(out: Path, seconds: float, limit: float, names: str) -> "subprocess.Popen[str]":
    words = [sys.executable, "-m", "tests.benchmarks.harness_job", str(out), str(seconds), str(limit), names]
    return subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def is_there(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.fixture(scope="module")
def misbehaved(tmp_path_factory):
    out = tmp_path_factory.mktemp("contact")
    job = harness(out, 29, 4, MISBEHAVING)
    _, errors = job.communicate(timeout=60)
    assert job.returncode == 0, errors
    return out


def words(out: Path) -> dict[str, list[str]]:
    found: dict[str, list[str]] = json.loads((out / "outcomes.json").read_text())["words"]
    return found


def test_every_step_has_its_turn_whatever_the_one_before_did(misbehaved):
    assert {name: word for name, (word, _) in words(misbehaved).items()} == {
        "exits": "died",
        "segfaults": "died",
        "half_a_line": "died",
        "device_full": "memory",
        "hangs": "hung",
        "leaves": "ok",
        "fills": "memory",
        "floods": "ok",
        "off": "off",
        "nan": "off",
        "silent": "off",
        "absent": "absent",
        "good": "ok",
        "later": "dropped",
    }


@pytest.mark.parametrize(
    "name, why",
    [
        ("exits", "exit code 3: the reason"),
        ("segfaults", "ended by SIGSEGV"),
        ("half_a_line", "ended by SIGKILL"),
        ("device_full", "CUDA out of memory"),
        ("hangs", "no end after 4 s"),
        ("fills", "0.3 may be had"),
        ("off", "1 of 2 checks"),
        ("silent", "without a check"),
        ("absent", "it is not there"),
        ("later", "it wants 30"),
    ],
)
def test_why_is_said(misbehaved, name, why):
    assert why in words(misbehaved)[name][1]


def test_what_a_step_wrote_before_it_ended_is_there(misbehaved):
    lines = record.read(misbehaved / "results.jsonl")
    for name in ("exits", "segfaults", "half_a_line", "floods"):
        assert [line["ok"] for line in lines if line["step"] == name and line["event"] == "check"] == [True]
    ends = {line["step"]: line for line in lines if line["event"] == "end"}
    # The line that was cut in half took nothing along but itself.
    assert list(ends) == MISBEHAVING.split(",")
    assert "waiting" in ends["hangs"]["tail"]


def test_nobody_outlives_a_step_in_whatever_session(misbehaved):
    left = (misbehaved / "results.jsonl.left").read_text().split()
    assert len(left) == 2
    assert not [process for process in left if is_there(int(process))]


def test_a_flood_keeps_its_beginning_and_its_end(misbehaved):
    said = (misbehaved / "steps.log").read_text().partition("===== floods")[2].partition("=====")[0]
    assert "first\n" in said and "last\n" in said and "bytes left out" in said
    assert len(said) < 400_000


def test_few_plain_files_come_back(misbehaved):
    ours = {"outcomes.json", "results.jsonl.left"}
    assert {path.name for path in misbehaved.iterdir()} - ours == {"summary.txt", "results.jsonl", "steps.log"}


def test_a_harness_that_is_told_to_end_writes_its_summary(tmp_path):
    job, results = harness(tmp_path, 600, 600, "good,asleep,later"), tmp_path / "results.jsonl"
    patience = time.monotonic() + 30
    while not any(line["step"] == "asleep" and line["event"] == "check" for line in record.read(results)):
        assert time.monotonic() < patience
        time.sleep(0.05)
    began = time.monotonic()
    job.send_signal(signal.SIGTERM)
    job.communicate(timeout=30)
    assert time.monotonic() - began < 10
    found = json.loads((tmp_path / "outcomes.json").read_text())
    assert not found["whole"]
    assert [word for word, _ in found["words"].values()] == ["ok", "hung", "dropped"]
    summary = (tmp_path / "summary.txt").read_text()
    assert "cut off: SIGTERM" in summary and "dropped" in summary


# --- the summary --------------------------------------------------------------------------------------------------


def test_a_summary_is_one_screen_however_much_is_off():
    outcomes = [Outcome(f"step {number}", "what it shows", "died", 1.5, "why " * 60) for number in range(16)]
    check = {"step": "step 1", "event": "check", "name": "it", "got": 1, "expected": "2", "ok": False}
    text = summarise("title", outcomes, [check] * 50)
    lines = text.splitlines()
    assert len(lines) <= SCREEN and max(map(len, lines)) <= WIDTH
    assert "lines more" in text and lines[-1].startswith("16 died")


def test_a_summary_says_what_was_expected_and_leaves_out_what_was_met():
    check = {"step": "step", "event": "check", "name": "the loss", "got": 1.5, "expected": "at most 1", "ok": False}
    met = {**check, "name": "the gradient", "ok": True}
    text = summarise("title", [Outcome("step", "what it shows", "off", 1.0, "1 of 2 checks")], [check, met])
    assert "step: the loss: 1.5, expected at most 1" in text and "the gradient" not in text


@pytest.mark.parametrize(
    "judge, ok",
    [
        (lambda it: it.near("n", 1.04, 1.0, 0.05), True),
        (lambda it: it.near("n", 1.06, 1.0, 0.05), False),
        (lambda it: it.near("n", float("nan"), 1.0, 0.05), False),
        (lambda it: it.between("n", 0.5, 0.5, 1.0), True),
        (lambda it: it.between("n", 0.49, 0.5, 1.0), False),
        (lambda it: it.at_least("n", float("nan"), 0.0), False),
        (lambda it: it.at_most("n", float("inf"), 1.0), False),
    ],
)
def test_what_is_off_is_off(tmp_path, judge, ok):
    judge(record.Record(tmp_path / "results.jsonl", "step", False))
    assert [line["ok"] for line in record.read(tmp_path / "results.jsonl")] == [ok]


def test_a_part_that_fails_is_told_and_the_next_runs_unless_the_device_is_lost(tmp_path):
    it = record.Record(tmp_path / "results.jsonl", "step", False)
    with it.part("one"):
        raise ValueError("no kernel")
    with pytest.raises(RuntimeError, match="CUDA error"), it.part("two"):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")
    assert [(line["name"], line["ok"]) for line in record.read(tmp_path / "results.jsonl")] == [
        ("one", False),
        ("two", False),
    ]


# --- what the steps find -------------------------------------------------------------------------------------------


def python_that(tmp_path: Path, condition: str) -> str:
    """A stand-in for the interpreter: whether Transformer Engine imports depends on the environment, and there is no
    GPU."""
    script = tmp_path / "python"
    script.write_text(
        f"#!/bin/sh\ncase $2 in *transformer_engine*) {condition};; esac\necho 'no driver' >&2; exit 1\n"
    )
    script.chmod(0o755)
    return str(script)


@pytest.fixture
def packs(tmp_path):
    for name in ("engine", "rest"):
        inside = tmp_path / name / ("transformer_engine" if name == "engine" else "nemo")
        inside.mkdir(parents=True)
        (inside / "__init__.py").write_text("")
        subprocess.run(["tar", "-cJf", tmp_path / f"{name}.tar.xz", "-C", tmp_path / name, inside.name], check=True)
    with zipfile.ZipFile(tmp_path / "small-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("small.py", "")
    return surroundings.unpack(tmp_path, tmp_path / "site")


@pytest.mark.parametrize(
    "condition, home, said, left",
    [
        ("exit 0", False, "imports: as it is", 3),
        ('[ -n "$CUDA_HOME" ] && exit 0', True, "imports: CUDA_HOME set to torch's packages", 3),
        ("exit 1", False, "left out", 2),
    ],
)
def test_cuda_home_is_set_only_where_it_helps_and_what_does_not_import_is_left_out(
    tmp_path, packs, condition, home, said, left
):
    environment, found = surroundings.settle(python_that(tmp_path, condition), {"PYTHONPATH": "/ours"}, packs)
    assert ("CUDA_HOME" in environment) == home
    assert found["Transformer Engine"] == said and found["no GPU"] == "no driver"
    ours, *theirs = environment["PYTHONPATH"].split(":")
    assert ours == "/ours" and len(theirs) == left
    assert {path.name for folder in theirs for path in Path(folder).iterdir()} >= {"nemo", "small.py"}


@pytest.mark.parametrize(
    "words, said", [(["--only", "lossses"], "lossses is no step"), ([], "holds the results of another call")]
)
def test_the_call_refuses_in_one_sentence(tmp_path, words, said):
    if not words:
        (tmp_path / "results.jsonl").write_text("{}\n")
    call = Path(contact.__file__).parents[1] / "first_contact.sh"
    environment = {**os.environ, "PYTHON": sys.executable}
    run = subprocess.run(
        ["bash", call, tmp_path, *words], env=environment, capture_output=True, text=True, check=False
    )
    assert run.returncode == 1 and said in run.stderr and len(run.stderr.splitlines()) == 1


# --- the table of the steps ---------------------------------------------------------------------------------------


def test_every_step_is_a_function_that_is_there():
    for each in contact.CONTACTS:
        module, _, function = each.does.partition(":")
        source = (Path(contact.__file__).parent / f"{module}.py").read_text()
        assert f"def {function}(record: Record" in source
        assert 0 < each.least < each.limit


def test_a_step_that_is_none_is_refused():
    with pytest.raises(ValueError, match="lossses is no step: choose from machine, imports"):
        contact.check(["lossses"])


def test_the_rehearsed_peaks_are_those_of_the_runs_that_are_measured():
    rehearsed = json.loads(memory.REHEARSED.read_text())
    assert set(rehearsed) == {describe(case) for case in memory.CASES}
    for case in memory.CASES:
        config, planned = memory.planned_case(case)
        entry = rehearsed[describe(case)]
        assert entry["digest"] == digest(config), "python -m benchmarks.gpu.first_contact.rehearsed"
        assert 0 <= planned / entry["peak"] - 1 < 0.03


def off(tmp_path: Path) -> list[str]:
    return [line["name"] for line in record.read(tmp_path / "r.jsonl") if line["event"] == "check" and not line["ok"]]


@pytest.mark.parametrize(
    "slower, is_off",
    [(1.0, []), (1.04, ["pre: step time of neva's"]), (float("nan"), ["pre: step time of neva's", "pre: ms a step"])],
)
def test_a_step_on_a_gpu_is_held_against_the_plans(tmp_path, monkeypatch, slower, is_off):
    """What only a GPU can measure is made up here: nobody has seen those lines run on one."""
    planned = 0.118

    def measured(_, settings, scratch):
        times = {side: [[(planned * (slower if side == "pre" else 1), 0.1)] * 4] * 6 for side in settings.sides}
        return times, dict.fromkeys(settings.sides, 30 << 30), {"gpu": "NVIDIA H200"}

    monkeypatch.setattr("benchmarks.overhead.measure_in_turns", measured)
    monkeypatch.setattr(runs, "data_sheet", lambda: DEVICES["h200"])
    runs.pre_step(record.Record(tmp_path / "r.jsonl", "pre_step", on_cpu=False))
    assert off(tmp_path) == is_off


def test_a_peak_on_a_gpu_is_held_against_plan_and_rehearsal(tmp_path, monkeypatch):
    one = next(iter(json.loads(memory.REHEARSED.read_text()).values()))
    found = [{"measured_bytes": int(one["peak"] * 1.2), "planned_bytes": one["plan"]}, None]
    monkeypatch.setattr(memory, "in_processes", lambda target, arguments: found)
    memory.peaks(record.Record(tmp_path / "r.jsonl", "memory", on_cpu=False))
    first, second = memory.CASES
    assert off(tmp_path) == [
        f"case {first}: plan over measured",
        f"case {first}: rehearsal over measured",
        f"case {second}",
    ]


@pytest.mark.parametrize("speed, is_off", [(0.9, 0), (0.5, 2)])
def test_flexattention_is_held_against_causal_attention(tmp_path, monkeypatch, speed, is_off):
    one = {f"{way}_{what}": value for way in ("forward", "backward") for what, value in TIMES.items()}
    flex = {**one, **{f"{way}_speed_per_pair_of_causal": speed for way in ("forward", "backward")}, "forward_ms": 0.5}
    found = {"causal": one, "dense": one, "split": one, "flex": {**flex, "backward_ms": 0.5}}
    monkeypatch.setattr("benchmarks.mixed_attention.measure", lambda length, on_gpu: found)
    kernels.flex(record.Record(tmp_path / "r.jsonl", "flex", on_cpu=False))
    assert len(off(tmp_path)) == is_off


TIMES = {"ms": 1.0, "speed_per_pair_of_causal": 0.4}


# --- the upload ---------------------------------------------------------------------------------------------------


@pytest.fixture
def clone(tmp_path):
    root, packs = tmp_path / "clone", tmp_path / "packs"
    for folder in (root, packs):
        folder.mkdir()
    for name, size in {"small.py": 10, "grown.bin": 3 << 20, "not tracked.bin": 9 << 20}.items():
        (root / name).write_bytes(os.urandom(size))
    (packs / "libraries.tar.xz").write_bytes(os.urandom(2 << 20))
    subprocess.run(["git", "init", "-q", root], check=True)
    subprocess.run(["git", "-C", root, "add", "small.py", "grown.bin"], check=True)
    return root, packs


def test_the_upload_is_what_git_tracks_and_the_packs(clone):
    root, packs = clone
    files = {**pack_upload.tracked(root), **pack_upload.packs_in(packs)}
    assert sorted(files) == ["grown.bin", "packs/libraries.tar.xz", "small.py"]
    assert pack_upload.refuse_too_large(files, 64) == pytest.approx(5, abs=0.01)


def test_an_upload_that_is_too_large_is_refused_with_its_largest_files(clone):
    root, packs = clone
    files = {**pack_upload.tracked(root), **pack_upload.packs_in(packs)}
    with pytest.raises(ValueError) as refused:
        pack_upload.refuse_too_large(files, 4.5)
    assert str(refused.value).startswith(
        "The upload has 5.0 MiB and may have 4.5: leave out some of the largest files"
    )
    assert str(refused.value).endswith("in MiB grown.bin (3.0), packs/libraries.tar.xz (2.0), small.py (0.0).")


def test_an_upload_without_packs_a_clone_or_a_file_is_refused(clone, tmp_path):
    root, packs = clone
    with pytest.raises(ValueError, match="holds neither"):
        pack_upload.packs_in(root)
    with pytest.raises(ValueError, match="is no clone"):
        pack_upload.tracked(packs)
    (root / "small.py").unlink()
    with pytest.raises(ValueError, match="git tracks small.py, which is not there"):
        pack_upload.tracked(root)


def test_a_rehearsed_call_knows_nothing_of_this_environment(tmp_path, monkeypatch, capfd):
    call = tmp_path / "call.sh"
    call.write_text('mkdir -p "$1" && echo "$PYTHON $PACKS ${PYTHONPATH-none} $2 $3 $4" > "$1/said" && exit 7')
    pack_upload.write({pack_upload.CALL: call, "packs/one.whl": call}, tmp_path / "upload.tar.gz")
    monkeypatch.setenv("PYTHONPATH", "/of/this/machine")
    folder = tmp_path / "there"
    assert pack_upload.rehearse(tmp_path / "upload.tar.gz", folder, "python3.12", ["--only", "te"]) == 7
    said = (folder / "out" / "said").read_text().split()
    assert said == ["python3.12", str(folder / "tree" / "packs"), "none", "--on-cpu", "--only", "te"]
    assert "brings back 1 files" in capfd.readouterr().out
    with pytest.raises(ValueError, match="is not empty"):
        pack_upload.rehearse(tmp_path / "upload.tar.gz", folder, "python3.12", [])
