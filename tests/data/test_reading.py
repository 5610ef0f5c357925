"""From shards to batches, and what happens when a file is missing, cut or broken."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from nemo_pre.checks.data import check_data
from nemo_pre.data.collate import Collate
from nemo_pre.data.conversation import IMAGE_TOKEN_INDEX
from nemo_pre.data.dataset import ConversationDataset
from nemo_pre.data.errors import SampleError
from nemo_pre.data.evaluation import load_validation_samples
from nemo_pre.data.images import image_tensor
from nemo_pre.data.manifest import read_manifest
from nemo_pre.data.preprocessing import build_preprocessing
from nemo_pre.data.scoring import Score, exact_match
from tests.data.prepared import digits_config


def _dataset(path: Path, on_error: str = "raise", **data: object) -> ConversationDataset:
    return ConversationDataset(
        read_manifest(path), "train", build_preprocessing(digits_config(path, **data)), on_error
    )


def _place(path: Path, key: str, extension: str) -> tuple[Path, int, int]:
    for index in sorted(path.glob("*.index.json")):
        for entry in json.loads(index.read_text()):
            if entry["key"] == key:
                offset, size = entry["members"][extension]
                return path / index.name.replace(".index.json", ".tar"), offset, size
    raise AssertionError(key)


def _overwrite(path: Path, key: str, extension: str, content: bytes) -> None:
    tar, offset, _ = _place(path, key, extension)
    with tar.open("r+b") as file:
        file.seek(offset)
        file.write(content)


def _first_with_image(dataset: ConversationDataset, start: int = 0) -> int:
    return next(i for i in range(start, len(dataset)) if dataset.samples.read(i).image is not None)


def test_image_by_hand():
    pixels = np.zeros((2, 2, 3), np.uint8)
    pixels[0, 1] = [255, 51, 0]
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    tensor = image_tensor(buffer.getvalue(), 2, [0.5, 0.0, 0.0], [0.5, 0.2, 1.0], "s")
    assert tensor.shape == (3, 2, 2)
    assert tensor.dtype == torch.float32
    torch.testing.assert_close(tensor[:, 0, 1], torch.tensor([1.0, 1.0, 0.0]))
    torch.testing.assert_close(tensor[:, 0, 0], torch.tensor([-1.0, 0.0, 0.0]))
    assert image_tensor(Image.new("L", (10, 20)), 6, [0.0] * 3, [1.0] * 3, "s").shape == (3, 6, 6)


def test_a_batch_keeps_the_contract(digits):
    dataset = _dataset(digits)
    with_image = _first_with_image(dataset)
    text_only = next(i for i in range(len(dataset)) if dataset.samples.read(i).image is None)
    items = [dataset[text_only], dataset[with_image]]
    batch = Collate(text_tokens=25, padding_id=0)(items)
    assert set(batch) == {
        "tokens", "labels", "loss_mask", "position_ids", "attention_mask", "media", "num_media_tiles", "keys"
    }  # fmt: skip
    for name in ("tokens", "labels", "position_ids"):
        assert batch[name].shape == (2, 25)
        assert batch[name].dtype == torch.int64
    assert torch.equal(batch["loss_mask"], (batch["labels"] != -100).float())
    assert batch["loss_mask"].sum(dim=1).min() >= 4, "two answers and their ends"
    assert batch["position_ids"][1].tolist() == list(range(25))
    assert batch["attention_mask"] is None
    assert (batch["tokens"] == IMAGE_TOKEN_INDEX).sum(dim=1).tolist() == [0, 1]
    assert batch["media"].shape == (1, 3, 48, 48)
    assert torch.equal(batch["media"][0], items[1].images[0][0])
    assert batch["num_media_tiles"] == [1]
    length = len(items[1].tokens)
    assert batch["tokens"][1, :length].tolist() == items[1].tokens
    assert batch["tokens"][1, length:].tolist() == [0] * (25 - length)


def test_a_micro_batch_without_an_image_has_no_media(digits):
    dataset = _dataset(digits)
    text_only = next(i for i in range(len(dataset)) if dataset.samples.read(i).image is None)
    batch = Collate(25, 0)([dataset[text_only]])
    assert batch["media"] is None
    assert batch["num_media_tiles"] == []


def test_every_sample_fits_the_text_width_and_a_narrower_one_is_counted(digits):
    dataset = _dataset(digits)
    for position in range(len(dataset)):
        dataset[position]
    assert dataset.counts() == {"skipped": 0, "cut": 0}
    config = digits_config(digits)
    config.data.sequence_length = 76
    narrow = ConversationDataset(read_manifest(digits), "train", build_preprocessing(config))
    lengths = [len(narrow[position].tokens) for position in range(len(narrow))]
    full = [len(dataset[position].tokens) for position in range(len(dataset))]
    assert max(lengths) == 13
    assert narrow.counts()["cut"] == sum(length > 13 for length in full) > 0


def test_counts_add_up_over_loader_processes(digits):
    config = digits_config(digits)
    config.data.sequence_length = 76
    here = ConversationDataset(read_manifest(digits), "train", build_preprocessing(config))
    for position in range(64):
        here[position]
    there = ConversationDataset(read_manifest(digits), "train", build_preprocessing(config))
    loader = torch.utils.data.DataLoader(
        torch.utils.data.Subset(there, range(64)), batch_size=4, num_workers=2, collate_fn=Collate(13, 0)
    )
    assert len(list(loader)) == 16
    assert there.counts() == here.counts()
    assert here.counts()["cut"] > 0


def test_no_room_for_text_and_a_small_vocabulary_are_refused(digits):
    config = digits_config(digits)
    config.data.sequence_length = 64
    with pytest.raises(ValueError, match="sequence_length=64 leaves no room"):
        build_preprocessing(config)
    config = digits_config(digits)
    config.model.language.vocab_size = 40
    with pytest.raises(ValueError, match="vocab_size"):
        build_preprocessing(config)
    with pytest.raises(ValueError, match="vocab_size"):
        check_data(digits, vocab_size=40)


def test_a_dry_run_check_finds_missing_and_wrong_files(digits_copy, tmp_path):
    assert check_data(digits_copy, vocab_size=128).num_samples("train") == 320
    with pytest.raises(ValueError, match="nemo-pre data demo"):
        check_data(tmp_path / "nothing")
    shard = digits_copy / "train-00003.tar"
    content = shard.read_bytes()
    shard.write_bytes(content[:-10])
    with pytest.raises(ValueError, match=r"train-00003\.tar has .* bytes where the manifest says"):
        check_data(digits_copy)
    shard.unlink()
    with pytest.raises(ValueError, match=r"train-00003\.tar is named in the manifest but missing"):
        check_data(digits_copy)
    with pytest.raises(ValueError, match="missing"):
        _dataset(digits_copy, on_error="skip")
    shard.write_bytes(content)
    _overwrite(digits_copy, "train-000000", "json", b"[")
    with pytest.raises(ValueError, match="train-000000 .* broken JSON"):
        check_data(digits_copy)
    (digits_copy / "manifest.json").write_text('{"format": "other"}')
    with pytest.raises(ValueError, match="is not a manifest"):
        check_data(digits_copy)


def test_broken_json_and_images_name_shard_and_key(digits_copy):
    _overwrite(digits_copy, "train-000005", "json", b"{{")
    dataset = _dataset(digits_copy)
    with pytest.raises(SampleError, match=r"train-000005 of .*train-00000\.tar has broken JSON"):
        dataset[5]
    broken = _first_with_image(dataset, 70)
    _overwrite(digits_copy, f"train-{broken:06d}", "png", b"not a PNG")
    with pytest.raises(SampleError, match=rf"train-{broken:06d} of .*train-00001\.tar has an image that cannot"):
        dataset[broken]
    damaged = _first_with_image(dataset, broken + 1)
    _, _, size = _place(digits_copy, f"train-{damaged:06d}", "png")
    tar, offset, _ = _place(digits_copy, f"train-{damaged:06d}", "png")
    with tar.open("r+b") as file:
        file.seek(offset + size // 2)
        file.write(b"\0" * (size // 4))
    with pytest.raises(SampleError, match=f"train-{damaged:06d}"):
        dataset[damaged]
    dataset[broken - 1]


def test_a_skipped_sample_is_replaced_by_the_next_readable_one_and_counted(digits_copy):
    _overwrite(digits_copy, "train-000005", "json", b"{{")
    _overwrite(digits_copy, "train-000006", "json", b"{{")
    dataset = _dataset(digits_copy, on_error="skip")
    assert dataset[5].key == "train-000007"
    assert dataset[5].key == "train-000007"
    assert dataset.counts() == {"skipped": 4, "cut": 0}


def test_the_end_of_a_truncated_tar_is_skipped_and_the_last_sample_wraps_around(digits_copy):
    shard = digits_copy / "train-00004.tar"
    _, offset, _ = _place(digits_copy, "train-000318", "json")
    shard.write_bytes(shard.read_bytes()[:offset])
    with pytest.raises(ValueError, match=r"train-00004\.tar has"):
        _dataset(digits_copy)
    dataset = _dataset(digits_copy, on_error="skip")
    with pytest.raises(SampleError, match="train-000318 .* the tar ends inside json"):
        dataset.samples.read(318)
    assert dataset[317].key == "train-000317"
    assert dataset[318].key == "train-000000"


def test_an_index_of_another_tar_is_noticed(digits_copy):
    index = digits_copy / "train-00000.index.json"
    entries = json.loads(index.read_text())
    entries[0]["members"]["json"], entries[1]["members"]["json"] = (
        entries[1]["members"]["json"],
        entries[0]["members"]["json"],
    )
    text = json.dumps(entries, separators=(",", ":"))
    index.write_text(text + " " * (index.stat().st_size - len(text)))
    with pytest.raises(SampleError, match="where the index has"):
        _dataset(digits_copy).samples.read(0)


def test_a_dataset_without_a_readable_sample_is_an_error_even_when_skipping(digits_copy):
    for shard in digits_copy.glob("train-*.tar"):
        shard.write_bytes(b"\0" * shard.stat().st_size)
    with pytest.raises(ValueError, match="no readable sample in 100"):
        _dataset(digits_copy, on_error="skip")[0]
    with pytest.raises(ValueError, match="on_error=ignore"):
        _dataset(digits_copy, on_error="ignore")


def test_validation_prompts_hold_the_question_but_not_the_answer(digits):
    config = digits_config(digits)
    tokenizer = build_preprocessing(config).tokenizer
    samples = load_validation_samples(config, 30)
    assert [sample.key for sample in samples] == [f"val-{i:06d}" for i in range(30)]
    for sample in samples:
        ids = sample.prompt.tolist()
        assert ids[0] == tokenizer.bos_token_id
        assert ids.count(IMAGE_TOKEN_INDEX) == (0 if sample.question_type == "text" else 1)
        assert (not sample.images) == (sample.question_type == "text")
        assert [image.shape for image in sample.images] in ([], [(1, 3, 48, 48)])
        question = tokenizer.decode([i for i in ids if i >= 0], skip_special_tokens=True)
        assert question.endswith(("?", "."))
        assert sample.answer
    assert len(load_validation_samples(config, 1000)) == 80


def test_scores_by_hand():
    scores = exact_match(
        ["3", " Yes ", "4 1", "no."], ["3", "yes", "4 7", "no"], ["count", "exists", "read", "exists"]
    )
    assert list(scores) == ["all", "count", "exists", "read"]
    assert scores["all"] == Score(3, 4)
    assert scores["exists"].accuracy == 1.0
    assert scores["read"] == Score(0, 1)
    assert exact_match([], [], []) == {}
