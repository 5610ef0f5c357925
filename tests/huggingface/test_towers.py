"""Fresh models of towers that are not LLaVA's: resampled positions, unused heads, and no encoder at all."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from nemo_pre.config.schema import VisionConfig
from nemo_pre.huggingface.distributed_checkpoint import CheckpointReader
from nemo_pre.huggingface.exporter import export_checkpoint
from nemo_pre.huggingface.importer import import_checkpoint
from nemo_pre.neva.vision import VisionTowerConfig
from nemo_pre.run_files.saved_config import read_saved, saved_model
from tests.huggingface.megatron_ranks import Question, ask
from tests.huggingface.test_logits import expanded
from tests.huggingface.tiny import tiny_llava, write_image_processor
from tests.ranks import run_on_standing_ranks

SHAPE = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "patch_size": 4}


@pytest.fixture(scope="module")
def language(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import AutoConfig, AutoModelForCausalLM

    root = tmp_path_factory.mktemp("language")
    both = tiny_llava(root / "both")
    AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(both).text_config).save_pretrained(root / "lm")
    for path in both.glob("tokenizer*"):
        shutil.copy(path, root / "lm")
    return root / "lm"


def tower(family: str, image_size: int) -> Any:
    from transformers import (
        Aimv2VisionConfig,
        Aimv2VisionModel,
        CLIPVisionConfig,
        CLIPVisionModel,
        Dinov2Config,
        Dinov2Model,
        SiglipVisionConfig,
        SiglipVisionModel,
    )

    shape = {**SHAPE, "image_size": image_size}
    model = {
        "clip": lambda: CLIPVisionModel(CLIPVisionConfig(intermediate_size=40, **shape)),
        "siglip": lambda: SiglipVisionModel(SiglipVisionConfig(intermediate_size=40, **shape)),
        "dinov2": lambda: Dinov2Model(Dinov2Config(mlp_ratio=2, **shape)),
        "aimv2": lambda: Aimv2VisionModel(Aimv2VisionConfig(intermediate_size=40, **shape)),
    }[family]()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, 0.0, 0.3)
    return model.eval()


@pytest.mark.parametrize("family", ["clip", "siglip", "dinov2"])
def test_at_another_resolution_a_tower_gives_the_features_of_transformers_own_interpolation(
    family, language, tmp_path
):
    from transformers import LlavaForConditionalGeneration

    original = tower(family, image_size=28)
    original.save_pretrained(tmp_path / "tower")
    write_image_processor(tmp_path / "tower", family, 28)
    import_checkpoint(
        vision=str(tmp_path / "tower"), language=str(language), out=str(tmp_path / "fresh"), image_size=16
    )
    export_checkpoint(str(tmp_path / "fresh"), str(tmp_path / "hf"))
    exported = LlavaForConditionalGeneration.from_pretrained(tmp_path / "hf").model.vision_tower.eval()
    pixels = torch.randn(2, 3, 16, 16)
    how = {} if family == "dinov2" else {"interpolate_pos_encoding": True}
    with torch.no_grad():
        expected = original(pixels, output_hidden_states=True, **how).hidden_states[-2]
        found = exported(pixels, output_hidden_states=True).hidden_states[-2]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    assert exported.config.image_size == saved_model(tmp_path / "fresh").vision.image_size == 16


def test_the_pixels_of_a_tower_are_its_processors_from_import_to_export_and_none_is_assumed(language, tmp_path):
    import numpy as np
    from PIL import Image
    from transformers import AutoImageProcessor, SiglipImageProcessor

    original = tower("siglip", image_size=16)
    original.save_pretrained(tmp_path / "tower")
    asked = {"vision": str(tmp_path / "tower"), "language": str(language), "out": str(tmp_path / "fresh")}
    with pytest.raises(ValueError, match="tower has no image processor .*or give processor=PATH"):
        import_checkpoint(**asked)
    assert not (tmp_path / "fresh").exists()
    processor = SiglipImageProcessor(size={"height": 16, "width": 16}, resample=2)
    nested = {"processor_class": "SiglipProcessor", "image_processor": processor.to_dict()}  # as transformers 5 has it
    (tmp_path / "tower" / "processor_config.json").write_text(json.dumps(nested))
    out = import_checkpoint(**asked)
    data, vision = read_saved(out).data, saved_model(out).vision
    assert (data.image_resize, data.image_filter, vision.image_mean) == ("whole", "bilinear", [0.5] * 3)
    export_checkpoint(str(out), str(tmp_path / "hf"))
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (30, 41, 3), dtype=np.uint8))
    exported = AutoImageProcessor.from_pretrained(tmp_path / "hf", use_fast=False)
    found, expected = (each(picture, return_tensors="pt")["pixel_values"] for each in (exported, processor))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


def test_the_head_of_an_aimv2_stays_behind(language, tmp_path):
    from transformers import LlavaForConditionalGeneration

    original = tower("aimv2", image_size=16)
    assert original.config.use_head
    original.save_pretrained(tmp_path / "tower")
    write_image_processor(tmp_path / "tower", "aimv2", 16)
    import_checkpoint(vision=str(tmp_path / "tower"), language=str(language), out=str(tmp_path / "fresh"))
    export_checkpoint(str(tmp_path / "fresh"), str(tmp_path / "hf"))
    exported = LlavaForConditionalGeneration.from_pretrained(tmp_path / "hf").model.vision_tower
    kept = {name: tensor for name, tensor in original.state_dict().items() if not name.startswith("head.")}
    assert exported.state_dict().keys() == kept.keys()
    assert all(torch.equal(tensor, exported.state_dict()[name]) for name, tensor in kept.items())
    assert not saved_model(tmp_path / "fresh").vision.drop_class_token


def test_an_aimv2_of_native_resolution_goes_over_with_its_limits_and_a_layer_of_choice(language, tmp_path):
    from transformers import Aimv2VisionConfig, Aimv2VisionModel

    original = Aimv2VisionModel(Aimv2VisionConfig(intermediate_size=40, is_native=True, **{**SHAPE, "image_size": 16}))
    original.save_pretrained(tmp_path / "tower")
    described = {"do_resize": False, "size": {"shortest_edge": 224}, "image_mean": [0.1] * 3, "image_std": [0.2] * 3}
    (tmp_path / "tower" / "preprocessor_config.json").write_text(json.dumps(described))  # as the published one's
    asked = {"vision": str(tmp_path / "tower"), "language": str(language), "feature_layer": -1}
    with pytest.raises(ValueError, match="tower takes images of any size: leave it out"):
        import_checkpoint(**asked, out=str(tmp_path / "no"), image_size=28)
    out = import_checkpoint(**asked, out=str(tmp_path / "fresh"))
    vision, reader = saved_model(out).vision, CheckpointReader(out)
    assert (vision.family, vision.image_size, vision.feature_layer) == ("aimv2_native", 0, -1)
    assert (vision.min_visual_tokens, vision.max_visual_tokens, vision.image_mean) == (16, 1280, [0.1] * 3)
    kept = {name: tensor for name, tensor in original.state_dict().items() if not name.startswith("head.")}
    found = {key for key in reader.tensors() if key.startswith("module.vision_model.")}
    assert found == {f"module.vision_model.{name}" for name in kept}
    assert all(torch.equal(reader.read(f"module.vision_model.{name}"), tensor) for name, tensor in kept.items())


@pytest.fixture(scope="module")
def encoder_free(language: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return import_checkpoint(
        vision="patch_mlp", language=str(language), out=str(tmp_path_factory.mktemp("free") / "fresh"), image_size=64
    )


def test_an_encoder_free_model_starts_from_a_new_patch_mlp(encoder_free):
    model = saved_model(encoder_free)
    assert (model.vision.family, model.vision.image_size, model.vision.feature_layer) == ("patch_mlp", 64, -1)
    reader, built = CheckpointReader(encoder_free), VisionTowerConfig(model.vision, seed=1234).configure_model()
    for name, tensor in built.state_dict().items():
        assert torch.equal(reader.read(f"module.vision_model.{name}"), tensor), name


@pytest.mark.parametrize(("attention", "rope"), [("causal", "1d"), ("mixed", "1d"), ("mixed", "2d")])
def test_an_exported_encoder_free_model_says_what_ours_says_with_the_code_beside_it(
    attention, rope, encoder_free, tmp_path
):
    from transformers import AutoModelForImageTextToText

    checkpoint = shutil.copytree(encoder_free, tmp_path / "checkpoint")
    described = (checkpoint / "config.yaml").read_text()
    described = described.replace("attention: causal", f"attention: {attention}").replace("rope: 1d", f"rope: {rope}")
    (checkpoint / "config.yaml").write_text(described)
    export_checkpoint(str(checkpoint), str(tmp_path / "hf"))
    exported = AutoModelForImageTextToText.from_pretrained(tmp_path / "hf", trust_remote_code=True).eval()
    asked = [Question(torch.tensor([5, -200, 9, 10]), torch.randn(1, 3, 64, 64)), Question(torch.tensor([7, 8]), None)]
    (told,) = run_on_standing_ranks(ask, 1, str(checkpoint), {}, asked, 3, 300)
    for question, found in zip(asked, told.logits, strict=True):
        with torch.no_grad():
            ids = expanded(question, exported.config.image_token_index)[None]
            expected = exported(input_ids=ids, pixel_values=question.pixels).logits[0, :, :300]
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
    assert told.cached == told.uncached


@pytest.mark.parametrize(
    ("changed", "sentence"),
    [
        (
            {"model_type": "vit_mae"},
            "vision tower of type vit_mae: only clip_vision_model, siglip_vision_model, dinov2",
        ),
        ({"use_swiglu_ffn": True}, "use_swiglu_ffn=True: only use_swiglu_ffn=False"),
    ],
)
def test_a_tower_that_cannot_be_built_is_refused_by_name(changed, sentence, language, tmp_path):
    model = tower("dinov2", image_size=16)
    save_file(model.state_dict(), _made(tmp_path / "tower") / "model.safetensors")
    (tmp_path / "tower" / "config.json").write_text(json.dumps({**model.config.to_dict(), **changed}))
    with pytest.raises(ValueError, match=sentence):
        import_checkpoint(vision=str(tmp_path / "tower"), language=str(language), out=str(tmp_path / "fresh"))


def test_a_recipe_of_a_published_tower_or_a_size_that_patches_do_not_divide_is_refused(language, tmp_path):
    with pytest.raises(ValueError, match="vision=dinov2_l14_336 starts from published weights"):
        import_checkpoint(vision="dinov2_l14_336", language=str(language), out=str(tmp_path / "fresh"))
    with pytest.raises(ValueError, match="image_size=40 must be a multiple"):
        import_checkpoint(vision="patch_mlp", language=str(language), out=str(tmp_path / "fresh"), image_size=40)


def test_a_llava_keeps_its_resolution(tmp_path):
    with pytest.raises(ValueError, match="a LLaVA keeps the resolution"):
        import_checkpoint(str(tmp_path), str(tmp_path / "out"), image_size=32)


def test_a_description_of_a_tower_is_the_one_that_transformers_gets_back(tmp_path):
    """Every family: our fields to transformers' configuration and back."""
    from nemo_pre.config.schema import LanguageConfig, ModelConfig
    from nemo_pre.config.vision_families import FAMILIES, class_tokens
    from nemo_pre.huggingface.architecture import hf_config, read_llava

    language = LanguageConfig(
        num_layers=2, hidden_size=32, ffn_hidden_size=56, num_attention_heads=4, num_query_groups=2, vocab_size=300,
        max_position_embeddings=128,
    )  # fmt: skip
    for name in (name for name, family in FAMILIES.items() if not family.native):
        vision = VisionConfig(
            family=name, image_size=16, patch_size=4, hidden_size=24, intermediate_size=48, num_layers=3,
            num_attention_heads=2,
        )  # fmt: skip
        if name == "patch_mlp":
            vision.num_layers, vision.num_attention_heads, vision.feature_layer = 0, 1, -1
        vision.drop_class_token = class_tokens(vision) > 0
        directory = _made(tmp_path / name)
        model = ModelConfig(name=name, vision=vision, language=language, tokenizer=str(directory))
        (directory / "config.json").write_text(json.dumps(hf_config(model, 299, 128, "float32")))
        assert read_llava(directory) == model


def _made(directory: Path) -> Path:
    directory.mkdir()
    return directory
