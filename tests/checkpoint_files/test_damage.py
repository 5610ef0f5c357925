"""A checkpoint whose bytes are not those that were saved is passed over, or refused by name."""

from __future__ import annotations

import json
import random
import shutil
from functools import partial
from pathlib import Path

import pytest

from nemo_pre.checkpoint_files.checksums import stored_checksum
from nemo_pre.checkpoint_files.inspection import damage_or_danger, inspect, inspect_together
from nemo_pre.checkpoint_files.metadata import read_metadata, weights_only
from nemo_pre.huggingface.exporter import complete_checkpoint, export_checkpoint
from nemo_pre.huggingface.importer import import_checkpoint
from nemo_pre.run_files.checkpoints import DAMAGE, damage_of, mark_damaged, newest_checkpoint, record_sizes
from nemo_pre.run_files.checksums import CHECKSUMS, record_checksums
from tests.huggingface.tiny import tiny_llava
from tests.ranks import run_ranks


@pytest.fixture(scope="module")
def imported(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("imported")
    import_checkpoint(str(tiny_llava(root / "hf")), str(root / "checkpoint"))
    return root / "checkpoint"


@pytest.fixture
def run(imported, tmp_path) -> Path:
    """A run's folder with steps 5 and 10, as a run leaves them."""
    for step in (5, 10):
        saved = shutil.copytree(imported, tmp_path / "run" / "checkpoints" / f"step={step}")
        record_checksums(saved)
        record_sizes(saved)
    return tmp_path / "run"


def flip(path: Path, at: int | None = None, count: int = 1) -> None:
    content = bytearray(path.read_bytes())
    start = random.Random(path.name).randrange(len(content) - count) if at is None else at
    for place in range(start, start + count):
        content[place] ^= 0x55
    path.write_bytes(content)


def randomize(path: Path) -> None:
    path.write_bytes(random.Random(0).randbytes(path.stat().st_size))


FILES = ["weights/__0_0.distcp", "weights/.metadata", "weights/common.pt", "weights/metadata.json", "config.yaml"]


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", [flip, partial(flip, count=64), randomize], ids=["a byte", "64 bytes", "all bytes"])
def test_the_one_before_a_changed_checkpoint_is_taken_and_that_is_said(run, caplog, name, damage):
    checkpoints = run / "checkpoints"
    damage(checkpoints / "step=10" / name)
    found = newest_checkpoint(checkpoints, damage_or_danger)
    assert found == str(checkpoints / "step=5")
    assert "step=10 is damaged, " in caplog.text and Path(name).name in caplog.text


def test_every_byte_of_every_file_counts(run):
    checkpoint = run / "checkpoints" / "step=10"
    for path in (path for path in checkpoint.rglob("*") if path.is_file() and path.stat().st_size):
        whole = path.read_bytes()
        for at in {0, len(whole) // 3, len(whole) - 1}:
            flip(path, at)
            assert inspect(checkpoint).damage, f"byte {at} of {path.name}"
        path.write_bytes(whole)
    assert inspect(checkpoint).damage == ""


def test_a_checkpoint_named_by_itself_is_refused_by_the_name_of_the_file(run, tmp_path):
    checkpoint = run / "checkpoints" / "step=10"
    flip(checkpoint / "weights" / "__0_0.distcp")
    with pytest.raises(
        ValueError, match=r"step=10 is damaged, __0_0.distcp has other bytes of \S+ than were saved: re"
    ):
        export_checkpoint(str(checkpoint), str(tmp_path / "out"))
    assert complete_checkpoint(str(run)).name == "step=5"  # export, generate and diagnose of a run


def test_what_is_not_read_is_not_verified(run, tmp_path):
    """The optimizer's tensors, which are most of a checkpoint, where only weights are wanted."""
    checkpoint = run / "checkpoints" / "step=10"
    weights = checkpoint / "weights"
    metadata = read_metadata(weights)
    index, place = next(iter(metadata.storage_data.items()))
    flip(weights / place.relative_path, place.offset + place.length // 2)
    assert inspect(checkpoint, lambda key: key != index.fqn).damage == ""
    assert index.fqn in inspect(checkpoint, lambda key: key == index.fqn).damage
    assert weights_only("module.decoder.x") and not weights_only("optimizer.state.exp_avg.module.decoder.x")


def test_an_import_knows_its_checksums_and_leaves_its_config_to_the_user(imported, tmp_path):
    copy = shutil.copytree(imported, tmp_path / "moved")
    config = copy / "config.yaml"
    config.write_text(config.read_text().replace(str(imported), str(copy)))
    assert inspect(copy).damage == "" and inspect(copy).verified
    assert all(stored_checksum(place) is not None for place in read_metadata(copy / "weights").storage_data.values())
    flip(copy / "weights" / "common.pt")
    assert inspect(copy).damage == "weights/common.pt has other bytes than were saved"


@pytest.mark.parametrize(
    "content", ["", "[1, 2]", '{"weights/.metadata": 1}', '{"weights/gone": "0"}', '{"/dev/zero": "0"}']
)
def test_checksums_that_are_damaged_themselves_are_no_pass(run, content):
    checkpoint = run / "checkpoints" / "step=10"
    (checkpoint / CHECKSUMS).write_text(content)
    record_sizes(checkpoint)
    assert inspect(checkpoint).damage


def test_a_mark_is_remembered_until_the_checkpoint_is_set_aside(run):
    checkpoint = run / "checkpoints" / "step=10"
    mark_damaged(checkpoint, "a file has other bytes")
    assert damage_of(checkpoint) == "a file has other bytes" == (checkpoint / DAMAGE).read_text().strip()
    assert newest_checkpoint(run / "checkpoints") == str(run / "checkpoints" / "step=5")


def test_ranks_read_a_share_each_and_agree(run):
    checkpoint = run / "checkpoints" / "step=10"
    parts = len(read_metadata(checkpoint / "weights").storage_data)
    (whole, changed), (same, too) = run_ranks(_inspected_before_and_after, 2, str(checkpoint))
    assert whole == same == ("", True)
    assert changed == too and "__0_0.distcp has other bytes" in changed[0]
    shares = json.loads((checkpoint / "shares.json").read_text())
    assert sum(shares) == parts and min(shares) > 0


def _inspected_before_and_after(path: str) -> list[tuple[str, bool]]:
    import os

    from nemo_pre.checkpoint_files import inspection

    checkpoint, found = Path(path), []
    if os.environ["RANK"] == "0":
        metadata = read_metadata(checkpoint / "weights")
        shares = [len(list(inspection._share(metadata, lambda key: True, rank, 2))) for rank in range(2)]
        (checkpoint / "shares.json").write_text(json.dumps(shares))
    for change in (False, True):
        if change and os.environ["RANK"] == "1":
            flip(checkpoint / "weights" / "__0_0.distcp")
        inspection.inspect_together(checkpoint)  # the others wait for the change
        answer = inspect_together(checkpoint)
        found.append((answer.damage, answer.verified))
    return found
