"""What transformers 5 wrote is what our model computes: its logits, of models that it saved under its own names.

The fixtures are of make_transformers5_fixtures.py: transformers 4, which runs here, shares our mistakes and cannot see
them.
"""

from __future__ import annotations

import itertools
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from nemo_pre.huggingface.distributed_checkpoint import CheckpointReader
from nemo_pre.huggingface.importer import import_checkpoint
from nemo_pre.huggingface.weights import TOWER
from nemo_pre.neva.vision import VisionTowerConfig
from nemo_pre.run_files.saved_config import saved_model
from tests.huggingface.make_transformers5_fixtures import IMAGE, LLAMA3, ROOT
from tests.huggingface.megatron_ranks import Question, ask
from tests.huggingface.tiny import tiny_tokenizer, write_image_processor
from tests.ranks import run_on_standing_ranks

VOCABULARY, OURS, SIDE = 300, -200, 16
WHOLE = ("llava_clip_llama3", "llava_siglip_qwen2_tied", "qwen2_5_vl")


def directory(name: str, root: Path) -> Path:
    """A model of transformers 5 with a tokenizer and an image processor beside it."""
    shutil.copytree(ROOT / name, root / name, ignore=shutil.ignore_patterns("said.safetensors"))
    tiny_tokenizer().save_pretrained(root / name)
    if name == "qwen2_5_vl":
        pixels = {"image_processor_type": "Qwen2VLImageProcessor", "patch_size": 4}
        statistics = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}
        (root / name / "preprocessor_config.json").write_text(json.dumps({**pixels, **statistics}))
    else:
        write_image_processor(root / name, "siglip" if "siglip" in name else "clip", SIDE)
    return root / name


@pytest.fixture(scope="module")
def imported(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("transformers5")
    out = {name: import_checkpoint(str(directory(name, root)), str(root / f"{name}_imported")) for name in WHOLE}
    language = directory("qwen2", root)
    for tower in ("clip", "siglip"):
        out[tower] = import_checkpoint(
            vision=str(directory(tower, root)), language=str(language), out=str(root / f"{tower}_imported")
        )
    return out


def questions(name: str) -> tuple[list[Question], list[Tensor]]:
    """What transformers 5 was asked, in our tokens and pixels, and the logits of the last positions."""
    said = load_file(ROOT / name / "said.safetensors")
    asked, logits = [], []
    for number in itertools.takewhile(lambda number: f"{number}.said" in said, itertools.count()):
        pixels, grids = said.get(f"{number}.pixel_values"), said.get(f"{number}.image_grid_thw")
        if grids is None:
            sizes = [SIDE] * (0 if pixels is None else len(pixels))
        else:
            assert pixels is not None
            grids = [(rows // 2, columns // 2) for _, rows, columns in grids.tolist()]
            sizes = [rows * columns for rows, columns in grids]
            frames = pixels.view(len(pixels), 3, 2, -1)
            assert torch.equal(frames[:, :, 0], frames[:, :, 1]), "a picture is two equal frames"
            pixels = frames[:, :, 0].reshape(-1, 4, 3 * frames.shape[-1])
        tokens = folded(said[f"{number}.input_ids"][0].tolist(), sizes)
        asked.append(Question(torch.tensor(tokens), pixels, grids))
        logits.append(said[f"{number}.said"])
    return asked, logits


def folded(ids: list[int], sizes: list[int]) -> list[int]:
    """One token where an image has as many as it has visual tokens."""
    tokens, left = [], list(sizes)
    while ids:
        count = left.pop(0) if ids[0] == IMAGE else 1
        tokens.append(OURS if ids[0] == IMAGE else ids[0])
        ids = ids[count:]
    return tokens


@pytest.mark.parametrize("name", [*WHOLE, "qwen2"])
def test_logits_are_those_that_transformers_5_computed(name, imported):
    asked, expected = questions(name)
    checkpoint = imported["clip" if name == "qwen2" else name]
    (found,) = run_on_standing_ranks(ask, 1, str(checkpoint), {}, asked, 1, VOCABULARY)
    assert len(expected) == len(found.logits) > 0
    for ours, theirs in zip(found.logits, expected, strict=True):
        torch.testing.assert_close(ours[-len(theirs) :], theirs, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", ["clip", "siglip"])
def test_features_of_a_tower_alone_are_those_that_transformers_5_computed(name, imported):
    reader = CheckpointReader(imported[name])
    tower = VisionTowerConfig(saved_model(imported[name]).vision, 1).configure_model()
    keys = [key for key in reader.tensors() if key.startswith(TOWER)]
    tower.load_state_dict({key.removeprefix(TOWER): reader.read(key).float() for key in keys})
    said = load_file(ROOT / name / "said.safetensors")
    with torch.no_grad():
        found = tower(said["0.pixel_values"], output_hidden_states=True).hidden_states[-2][0]
    torch.testing.assert_close(found[-len(said["0.said"]) :], said["0.said"], rtol=0, atol=1e-5)


def test_bases_and_scaling_of_rotary_positions_are_read(imported):
    languages = {name: saved_model(path).language for name, path in imported.items()}
    bases = {name: language.rotary_base for name, language in languages.items()}
    assert bases == {name: 5e5 if name == "llava_clip_llama3" else 1e6 for name in bases}
    scaling = languages["llava_clip_llama3"].rope_scaling
    assert (scaling.kind, scaling.factor, scaling.original_positions) == ("llama3", LLAMA3["factor"], 32)
    assert saved_model(imported["qwen2_5_vl"]).rope_sections == [2, 1, 1]
    assert [language.tie_embeddings for language in languages.values()] == [False, True, False, False, False]
