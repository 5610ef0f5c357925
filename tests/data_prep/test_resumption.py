"""The bytes are those of an undisturbed run: with any number of workers, and after kill -9 at any moment."""

from __future__ import annotations

import errno
import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from data_prep.prepare import prepare
from data_prep.prepare.chunks import Job
from data_prep.prepare.workplace import Workplace
from data_prep.shards import ShardWriter
from nemo_pre.checks.data import check_data
from tests.data_prep import layouts
from tests.data_prep.layouts import tree

OPTIONS = {"val_samples": 9, "shard_samples": 8, "seed": 4}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A blend of JSON and parquet with some bad samples."""
    folder = tmp_path_factory.mktemp("source")
    layouts.llava_pretrain(folder / "captions", 30)
    (folder / "captions" / "images" / "00000" / "000000003.jpg").unlink()
    layouts.llava_onevision(folder / "ov", 20)
    layouts.finevision(folder / "fv", 12)
    blend = {"sources": [{"path": "captions"}, {"path": "ov"}, {"path": "fv", "weight": 1.5}]}
    (folder / "blend.yaml").write_text(yaml.dump(blend))
    return folder / "blend.yaml"


@pytest.fixture(scope="module")
def undisturbed(source, tmp_path_factory):
    out = tmp_path_factory.mktemp("undisturbed") / "out"
    prepare(str(source), str(out), workers=1, **OPTIONS)
    return tree(out)


def _published(out: Path) -> dict[str, tuple[int, int]]:
    """Which file stands under each final name of a shard."""
    return {file.name: (file.stat().st_ino, file.stat().st_mtime_ns) for file in out.glob("*.tar")}


def test_three_workers_write_the_bytes_of_one(source, undisturbed, tmp_path):
    prepare(str(source), str(tmp_path / "out"), workers=3, **OPTIONS)
    assert tree(tmp_path / "out") == undisturbed
    assert json.loads(undisturbed["manifest.json"])["dropped"] == {"missing_image": 1}
    check_data(tmp_path / "out")


def _run_until_killed(source: Path, out: Path, moment: int) -> bool:
    """Runs in a process that kills itself when the ``moment``-th file is touched or block written; if it finished."""
    child = os.fork()
    if child == 0:
        try:
            left = moment

            def step(event: str, _arguments: object) -> None:
                nonlocal left
                if event in ("open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "shutil.rmtree", "write"):
                    left -= 1
                    if left == 0:
                        os.kill(os.getpid(), signal.SIGKILL)

            write = ShardWriter._write
            ShardWriter._write = lambda self, content: (step("write", ()), write(self, content))[1]  # type: ignore
            sys.addaudithook(step)
            prepare(str(source), str(out), workers=1, **OPTIONS)
            os._exit(0)
        finally:
            os._exit(1)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0, "the run failed instead of being killed"
    return os.WIFEXITED(status)


@pytest.mark.parametrize("seed", range(6))
def test_killed_at_random_moments_again_and_again_the_bytes_are_those_of_an_undisturbed_run(
    source, undisturbed, tmp_path, seed
):
    rng, out, published, kills = random.Random(seed), tmp_path / "out", {}, 0
    while not _run_until_killed(source, out, rng.randrange(1, 600)):
        kills += 1
        now = _published(out)
        assert all(now.get(name) == file for name, file in published.items()), "a finished shard was written again"
        assert all((out / name).read_bytes() == undisturbed[name] for name in now), "a shard is visible but not whole"
        published = now
    assert kills > 0
    assert {name: file for name, file in _published(out).items() if name in published} == published
    assert tree(out) == undisturbed


def test_a_run_with_several_workers_is_killed_and_leaves_none_behind(source, undisturbed, tmp_path):
    rng, out = random.Random(0), tmp_path / "out"
    code = (
        "import sys; from data_prep.prepare import prepare\n"
        "if __name__ == '__main__': "
        f"prepare(sys.argv[1], sys.argv[2], workers=2, **{OPTIONS!r})"
    )
    (tmp_path / "run.py").write_text(code)
    environment = {**os.environ, "PYTHONPATH": os.getcwd()}
    for _ in range(4):
        process = subprocess.Popen(
            [sys.executable, str(tmp_path / "run.py"), str(source), str(out)],
            stderr=subprocess.PIPE,
            env=environment,
        )
        try:
            process.wait(timeout=rng.uniform(0.3, 1.2))
        except subprocess.TimeoutExpired:
            process.kill()
        # Its workers hold the other end: the pipe ends when the last of them is gone.
        assert process.stderr is not None
        process.stderr.read()
        process.wait()
    prepare(str(source), str(out), workers=1, **OPTIONS)
    assert tree(out) == undisturbed


def test_a_second_run_writes_nothing(source, tmp_path, capfd):
    out = tmp_path / "out"
    first = prepare(str(source), str(out), workers=1, **OPTIONS)
    before = {file: file.stat().st_mtime_ns for file in out.rglob("*") if file.is_file()}
    capfd.readouterr()
    assert prepare(str(source), str(out), workers=2, **OPTIONS) == first
    assert "nothing to do" in capfd.readouterr().err
    assert {file: file.stat().st_mtime_ns for file in out.rglob("*") if file.is_file()} == before


def test_what_is_missing_or_cut_of_complete_data_is_written_again(source, undisturbed, tmp_path):
    out = tmp_path / "out"
    prepare(str(source), str(out), workers=1, **OPTIONS)
    (out / "train-00001.tar").unlink()
    (out / "train-00002.index.json").write_text("[]")
    (out / "val-00000.tar.idx").unlink()
    (out / ".nv-meta" / "split.yaml").unlink()
    kept = _published(out)
    prepare(str(source), str(out), workers=1, **OPTIONS)
    assert tree(out) == undisturbed
    assert _published(out)["train-00003.tar"] == kept["train-00003.tar"]


def test_damaged_data_whose_source_has_changed_is_not_mended_with_other_bytes(tmp_path):
    source, out = layouts.llava_pretrain(tmp_path / "captions", 12), tmp_path / "out"
    prepare(str(source), str(out), workers=1, val_samples=2)
    for image in source.rglob("*.jpg"):
        image.write_bytes(layouts.picture(99))
    (out / "train-00000.tar").unlink()
    with pytest.raises(ValueError, match="train-00000 does not come out as .* had it"):
        prepare(str(source), str(out), workers=1, val_samples=2)
    assert not (out / "train-00000.tar").exists()


def test_data_of_another_tool_is_left_alone(tmp_path):
    (tmp_path / "digits").mkdir()
    (tmp_path / "digits" / "manifest.json").write_text('{"dataset": "digits"}')
    with pytest.raises(ValueError, match="not prepared from a source"):
        prepare(str(layouts.llava_pretrain(tmp_path / "x")), str(tmp_path / "digits"), workers=1)
    assert list(tree(tmp_path / "digits")) == ["manifest.json"]


def test_other_data_or_options_are_refused(source, tmp_path):
    out = tmp_path / "out"
    prepare(str(source), str(out), workers=1, **OPTIONS)
    complete = tree(out)
    with pytest.raises(ValueError, match="other data or was prepared with other options"):
        prepare(str(source), str(out), workers=1, **{**OPTIONS, "seed": 5})
    with pytest.raises(ValueError, match="other data or was prepared with other options"):
        prepare(str(layouts.llava_instruct(tmp_path / "other")), str(out), workers=1, **OPTIONS)
    assert tree(out) == complete
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.tex").write_text("")
    with pytest.raises(ValueError, match="holds something else"):
        prepare(str(source), str(tmp_path / "home"), workers=1, **OPTIONS)
    assert tree(tmp_path / "home") == {"thesis.tex": b""}


def test_unfinished_data_of_other_options_is_refused(source, undisturbed, tmp_path):
    out = tmp_path / "out"
    assert not _run_until_killed(source, out, 500)
    assert _published(out)
    with pytest.raises(ValueError, match="unfinished preparation of other data"):
        prepare(str(source), str(out), workers=1, **{**OPTIONS, "seed": 5})
    prepare(str(source), str(out), workers=1, **OPTIONS)
    assert tree(out) == undisturbed


def test_a_chunk_that_is_whole_but_not_yet_in_place_is_moved_and_not_written_again(
    source, undisturbed, tmp_path, monkeypatch
):
    out, written, write = tmp_path / "out", [], Job._write_shards

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    def noted(self, chunk, staged):  # type: ignore[no-untyped-def]
        written.append(chunk.name)
        return write(self, chunk, staged)

    with monkeypatch.context() as patched:
        patched.setattr(Workplace, "publish", stop)
        with pytest.raises(KeyboardInterrupt):
            prepare(str(source), str(out), workers=1, **OPTIONS)
    assert not _published(out)
    monkeypatch.setattr(Job, "_write_shards", noted)
    prepare(str(source), str(out), workers=1, **OPTIONS)
    assert "train-00000" not in written and "train-00001" in written
    assert tree(out) == undisturbed


def test_what_a_killed_process_of_the_same_number_left_is_not_in_the_way(source, undisturbed, tmp_path):
    staged = Workplace(tmp_path / "out").staged("train-00000")
    staged.mkdir(parents=True)
    (staged / "train-00000-9.tar").write_bytes(b"x")
    prepare(str(source), str(tmp_path / "out"), workers=1, **OPTIONS)
    assert tree(tmp_path / "out") == undisturbed


def test_two_runs_do_not_fill_one_directory(source, tmp_path):
    with (
        Workplace(tmp_path / "out").opened(),
        pytest.raises(ValueError, match="another run is filling"),
    ):
        prepare(str(source), str(tmp_path / "out"), workers=1, **OPTIONS)


@pytest.mark.parametrize("room", [3_000, 80_000, 150_000])
def test_a_full_disk_is_one_sentence_and_the_next_run_continues(source, undisturbed, tmp_path, monkeypatch, room):
    out, left, write = tmp_path / "out", room, ShardWriter._write

    def write_while_there_is_room(self: ShardWriter, content: bytes) -> None:
        nonlocal left
        left -= len(content)
        if left < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(self, content)

    with monkeypatch.context() as patched:
        patched.setattr(ShardWriter, "_write", write_while_there_is_room)
        with pytest.raises(ValueError, match="the disk of .* is full"):
            prepare(str(source), str(out), workers=1, **OPTIONS)
    finished = _published(out)
    assert bool(finished) == (room > 30_000)
    assert not list((out / ".unfinished" / "staged").iterdir()), "what was begun still takes room"
    prepare(str(source), str(out), workers=1, **OPTIONS)
    assert tree(out) == undisturbed
    assert {name: file for name, file in _published(out).items() if name in finished} == finished
