"""Nothing is left at its initial value: what a model needs is in the files, and what is in the files has a place."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from nemo_pre.callbacks.resume import start_point
from nemo_pre.config.untrained import untrained_run
from nemo_pre.huggingface.architecture import read_whole
from nemo_pre.huggingface.distributed_checkpoint import CheckpointReader, StoredTensor, write_weights
from nemo_pre.huggingface.exporter import export_checkpoint
from nemo_pre.huggingface.importer import import_checkpoint
from nemo_pre.huggingface.loading import load_network
from nemo_pre.huggingface.safetensors_files import INDEX, SINGLE, TensorSource
from nemo_pre.huggingface.weights import checked_weights, hub_name, model_weights
from nemo_pre.run_files.saved_config import saved_model
from tests.huggingface.make_transformers5_fixtures import ROOT
from tests.huggingface.tiny import tiny_llava

Tensors = dict[str, torch.Tensor]
INNER = "vision_tower.vision_model."


@pytest.fixture(scope="module")
def llava(tmp_path_factory) -> Path:
    return tiny_llava(tmp_path_factory.mktemp("llava") / "hf", vision="siglip")


@pytest.fixture(scope="module")
def checkpoint(llava: Path) -> Path:
    return import_checkpoint(str(llava), str(llava.with_name("checkpoint")))


def changed(source: Path, target: Path, change: Callable[[Tensors], Tensors]) -> Path:
    shutil.copytree(source, target)
    tensors = {hub_name(name): tensor for name, tensor in load_file(source / SINGLE).items()}
    save_file(change(tensors), target / SINGLE)
    return target


def without(*parts: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {name: each for name, each in tensors.items() if not any(part in name for part in parts)}


def with_one(name: str, *shape: int) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {**tensors, name: torch.ones(shape)}


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (without("vision_tower."), r"no tensor vision_tower\S*, vision_tower\S*, vision_tower\S* and \d+ more, which"),
        (without("encoder.layers.2."), r"no tensor vision_tower\S*layers\.2\..* and 13 more, which"),
        (without("post_layernorm.weight"), "no tensor vision_tower.vision_model.post_layernorm.weight, which"),
        (without("head.probe"), "no tensor vision_tower.vision_model.head.probe, which"),
        (without("multi_modal_projector."), "no tensor multi_modal_projector.linear_1.weight, .* and 1 more, which"),
        (without("language_model."), r"no tensor language_model.model.embed_tokens.weight, .* and \d+ more, which"),
        (without("lm_head"), "no tensor language_model.lm_head.weight, which"),
        (
            with_one(f"{INNER}post_layernorm.weight", 23),
            r"post_layernorm.weight in .* shape \[23\] .* makes it \[24\]",
        ),
        (
            with_one(f"{INNER}encoder.layers.3.layer_norm1.weight", 24),
            "layers.3.layer_norm1.weight, which has no place",
        ),
        (with_one("image_newline", 32), "has image_newline, which has no place"),
        (with_one("vision_tower.post_layernorm.weight", 24), "which are the same: remove one"),
    ],
)
def test_what_is_missing_or_has_no_place_is_refused_by_name_at_import(change, sentence, llava, tmp_path):
    with pytest.raises(ValueError, match=sentence):
        import_checkpoint(str(changed(llava, tmp_path / "hf", change)), str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("same", [True, False])
def test_an_output_layer_beside_a_tied_embedding_must_be_the_embedding(same, tmp_path):
    source = tiny_llava(tmp_path / "tied", tie=True)

    def untied(tensors: Tensors) -> Tensors:
        embedding = tensors["language_model.model.embed_tokens.weight"]
        return {**tensors, "language_model.lm_head.weight": embedding.clone() if same else embedding + 1}

    directory = changed(source, tmp_path / "hf", untied)
    if same:
        import_checkpoint(str(directory), str(tmp_path / "out"))
        return
    with pytest.raises(ValueError, match="lm_head.weight, which is not its embedding, although its config.json ties"):
        import_checkpoint(str(directory), str(tmp_path / "out"))


def test_a_siglip_without_its_pooling_head_is_one(llava, tmp_path):
    directory = changed(llava, tmp_path / "hf", without(".head."))
    values = json.loads((directory / "config.json").read_text())
    values["vision_config"]["vision_use_head"] = False
    (directory / "config.json").write_text(json.dumps(values))
    out = import_checkpoint(str(directory), str(tmp_path / "out"))
    export_checkpoint(str(out), str(tmp_path / "back"))
    assert json.loads((tmp_path / "back" / "config.json").read_text())["vision_config"]["vision_use_head"] is False
    assert set(TensorSource(tmp_path / "back").names()) == set(TensorSource(directory).names())
    vision = saved_model(out).vision
    pixels = {"image_mean": vision.image_mean, "image_std": vision.image_std}  # which are the processor's
    assert replace(read_whole(tmp_path / "back").vision, **pixels) == vision


# --- checkpoints ----------------------------------------------------------------------------------------------------


def rewritten(checkpoint: Path, out: Path, kept: Callable[[str], bool]) -> Path:
    """A copy of a checkpoint without some of its tensors."""
    reader = CheckpointReader(checkpoint)
    tensors = [
        StoredTensor(key, None, None, shape, dtype, partial(reader.read, key))
        for key, (shape, dtype) in reader.tensors().items()
        if kept(key)
    ]
    out.mkdir()
    write_weights(out, tensors, lambda size: None)
    shutil.copyfile(checkpoint / "config.yaml", out / "config.yaml")
    return out


@pytest.mark.parametrize("part", ["vision_model.", "vision_model.vision_model.encoder.layers.2.", "final_layernorm"])
def test_a_checkpoint_that_lacks_a_weight_is_refused_by_training_and_by_export(part, checkpoint, tmp_path):
    damaged = rewritten(checkpoint, tmp_path / "damaged", lambda key: part not in key)
    run = untrained_run(saved_model(checkpoint), str(tmp_path / "run"))
    run.init_from = str(damaged)
    sentence = rf"{damaged} has no module\.\S*{part}.*, which its config.yaml asks for: name a whole checkpoint"
    for load in (
        lambda: start_point(run, {}),
        lambda: export_checkpoint(str(damaged), str(tmp_path / "hf")),
        lambda: CheckpointReader(damaged).check(run.model),
    ):
        with pytest.raises(ValueError, match=sentence):
            load()
    run.init_from = str(rewritten(checkpoint, tmp_path / "whole", lambda key: True))
    assert start_point(run, {}).weights_from == run.init_from


def test_a_checkpoint_may_hold_what_only_training_has_and_nothing_else(checkpoint):
    model = saved_model(checkpoint)
    shapes = {key: shape for key, (shape, _) in CheckpointReader(checkpoint).tensors().items()}
    beside = {"module.pre_heads.2.0.weight": (8, 32), "module.laver_teacher.center": (4,), "optimizer.state": (7,)}
    assert {weight.key for weight in checked_weights(model, {**shapes, **beside}, "here")} == shapes.keys()
    for found, sentence in (
        ({**shapes, "module.surprise": (1,)}, "here has module.surprise, which has no place in the model"),
        ({**shapes, "module.vision_projection.2.bias": (31,)}, r"shape \[31\] but its config.yaml makes it \[32\]"),
        ({}, "here has no module.language_model.embedding.word_embeddings.weight, .* more, which"),
    ):
        with pytest.raises(ValueError, match=sentence):
            checked_weights(model, found, "here")
    assert {weight.key for weight in model_weights(model)} == shapes.keys()


def test_a_name_that_nemo_cuts_is_refused(llava, checkpoint, tmp_path):
    with pytest.raises(ValueError, match=r"NeMo cuts \.ckpt off"):
        import_checkpoint(str(llava), str(tmp_path / "llava.ckpt"))
    run = untrained_run(saved_model(checkpoint), str(tmp_path / "run"))
    run.init_from = str(shutil.copytree(checkpoint, tmp_path / "moved.ckpt"))
    with pytest.raises(ValueError, match=r"moved\.ckpt: NeMo cuts \.ckpt off"):
        start_point(run, {})


# --- towers out of whole models -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def language(tmp_path_factory, llava: Path) -> Path:
    from transformers import AutoConfig, AutoModelForCausalLM

    root = tmp_path_factory.mktemp("language") / "lm"
    AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(llava).text_config).save_pretrained(root)
    for path in llava.glob("tokenizer*"):
        shutil.copy(path, root)
    return root


def test_the_tower_of_a_llava_or_of_an_export_is_imported_by_itself(llava, checkpoint, language, tmp_path):
    exported = export_checkpoint(str(checkpoint), str(tmp_path / "hf"))
    tensors = {hub_name(name): tensor for name, tensor in load_file(llava / SINGLE).items()}
    for number, directory in enumerate((llava, exported)):
        out = import_checkpoint(vision=str(directory), language=str(language), out=str(tmp_path / f"out{number}"))
        reader = CheckpointReader(out)
        found = {key.removeprefix("module.vision_model."): key for key in reader.tensors() if ".vision_model." in key}
        expected = {name.removeprefix("vision_tower."): t for name, t in tensors.items() if name.startswith("vision_")}
        assert found.keys() == expected.keys()
        assert all(torch.equal(reader.read(found[name]), tensor) for name, tensor in expected.items())
        assert saved_model(out).vision == saved_model(checkpoint).vision
    broken = changed(llava, tmp_path / "broken", without("encoder.layers.1."))
    with pytest.raises(ValueError, match=r"layers\.1\..* and 13 more, which its config.json asks for"):
        import_checkpoint(vision=str(broken), language=str(language), out=str(tmp_path / "no"))


def test_a_directory_that_transformers_would_fill_at_random_is_not_asked(llava, tmp_path):
    assert load_network(llava, local_files_only=True).config.model_type == "llava"
    broken = changed(llava, tmp_path / "broken", without("encoder.layers.1."))
    with pytest.raises(ValueError, match=r"no weights that fit \S*layers\.1\..* more: name a directory that is whole"):
        load_network(broken, local_files_only=True)
    with pytest.raises(ValueError, match="rope_parameters, which transformers 4.* does not read: import it"):
        load_network(ROOT / "llava_clip_llama3", local_files_only=True)


# --- files ----------------------------------------------------------------------------------------------------------


def in_two_files(source: Path, target: Path, kind: str) -> tuple[Path, dict[str, str]]:
    """The tensors of a directory in two files with an index, and its map."""
    shutil.copytree(source, target)
    tensors = load_file(target / SINGLE)
    (target / SINGLE).unlink()
    cut = "model-{}-of-2.safetensors" if kind == INDEX else "pytorch_model-{}-of-2.bin"
    halves = {cut.format(number): dict(list(tensors.items())[number - 1 :: 2]) for number in (1, 2)}
    for name, half in halves.items():
        save_file(half, target / name) if kind == INDEX else torch.save(half, target / name)
    weight_map = {name: file for file, half in halves.items() for name in half}
    (target / kind).write_text(json.dumps({"weight_map": weight_map}))
    return target, weight_map


@pytest.mark.parametrize("kind", [INDEX, "pytorch_model.bin.index.json"])
def test_an_index_names_files_of_its_folder_and_all_tensors_once(kind, llava, tmp_path):
    directory, names = in_two_files(llava, tmp_path / "hf", kind)
    assert sorted(TensorSource(directory, allow_pickle=True).names()) == sorted(names)
    first, file = next(iter(names.items()))
    shutil.copyfile(directory / file, tmp_path / file)
    (directory / "elsewhere").symlink_to(tmp_path / file)
    for content, sentence in (
        ({"weight_map": {**names, first: f"../{file}"}}, "leads out of"),
        ({"weight_map": {**names, first: str(tmp_path / file)}}, "leads out of"),
        ({"weight_map": {**names, first: "elsewhere"}}, "leads out of"),
        ({"weight_map": {**names, first: "nowhere"}}, "is missing"),
        ({"weight_map": {**names, "more": file}}, f"names more, which is not in {file}"),
        ({"weight_map": {**names, first: 3}}, "has no weight_map"),
        ({"weight_map": [file]}, "has no weight_map"),
        ({}, "has no weight_map"),
        ([], "does not hold a JSON object"),
        ("{", "cannot be read"),
    ):
        (directory / kind).write_text(content if isinstance(content, str) else json.dumps(content))
        with pytest.raises(ValueError, match=sentence):
            TensorSource(directory, allow_pickle=True)


def test_two_files_with_one_tensor_and_two_ways_to_read_a_directory_are_refused(llava, tmp_path):
    directory, names = in_two_files(llava, tmp_path / "hf", INDEX)
    first, second = sorted(set(names.values()))
    both = load_file(directory / first) | load_file(directory / second)
    save_file(both, directory / second)
    with pytest.raises(ValueError, match="and in another file: remove one"):
        TensorSource(directory)
    save_file(both, directory / SINGLE)
    with pytest.raises(ValueError, match=f"has {SINGLE} and {INDEX}: remove the one"):
        TensorSource(directory)


@pytest.mark.parametrize("name", [SINGLE, "config.json", "tokenizer.json"])
def test_a_link_that_leaves_its_directory_is_refused_and_the_hubs_cache_is_not_left(name, llava, tmp_path):
    directory = shutil.copytree(llava, tmp_path / "hf")
    shutil.move(directory / name, tmp_path / "outside")
    (directory / name).symlink_to("../outside")
    with pytest.raises(ValueError, match=rf"{name} leads out of .*, to {tmp_path}/outside: put a copy"):
        import_checkpoint(str(directory), str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()
    snapshot = shutil.copytree(llava, tmp_path / "models--a--b" / "snapshots" / "1234")
    (snapshot.parent.parent / "blobs").mkdir()
    shutil.move(snapshot / name, snapshot.parent.parent / "blobs" / "5678")
    (snapshot / name).symlink_to("../../blobs/5678")
    import_checkpoint(str(snapshot), str(tmp_path / "out"))
