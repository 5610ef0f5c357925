"""A Qwen2.5-VL in and out, whole and its tower alone: every tensor has its place, and logits are transformers'."""

from __future__ import annotations

import copy
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from nemo_pre.config.compose import compose_run
from nemo_pre.config.derived import axis_of_frequency
from nemo_pre.data.conversation import TEMPLATES
from nemo_pre.huggingface.architecture import read_whole
from nemo_pre.huggingface.exporter import export_checkpoint
from nemo_pre.huggingface.importer import import_checkpoint
from nemo_pre.huggingface.processor import jinja_template
from nemo_pre.huggingface.remote_code.configuration_spatial_qwen_vl import SpatialQwenVLConfig
from nemo_pre.huggingface.remote_code.modeling_spatial_qwen_vl import SpatialQwenVLForConditionalGeneration
from nemo_pre.huggingface.safetensors_files import TensorSource
from nemo_pre.run_files.saved_config import check_same_weights, saved_model
from nemo_pre.verbs.diagnose import diagnose_run
from tests.huggingface.megatron_ranks import Question, ask
from tests.huggingface.tiny import tiny_tokenizer
from tests.ranks import run_on_standing_ranks

IMAGE, VOCABULARY, NEW = -200, 300, 4
IMAGE_PAD, VIDEO_PAD, START, END = 290, 291, 292, 293
TEXT = {
    "vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 56, "num_hidden_layers": 4,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512, "rope_theta": 10000.0,
    "rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]},
}  # fmt: skip
SPATIAL = {  # visual_attention, visual_rope; of AIMv2 at native resolution or of Qwen2.5-VL's own tower
    "mixed 2d": ("mixed", "2d"),
    "mixed mrope": ("mixed", "mrope"),
    "mixed 1d": ("mixed", "1d"),
    "causal 2d": ("causal", "2d"),
    "causal 1d": ("causal", "1d"),
    "causal mrope": ("causal", "mrope"),  # without markers around its images
    "aimv2 mixed 2d": ("mixed", "2d"),
    "aimv2 causal mrope": ("causal", "mrope"),
}
PATCH = 4
VISION = {
    "depth": 3, "hidden_size": 16, "intermediate_size": 24, "num_heads": 2, "patch_size": PATCH, "window_size": 16,
    "fullatt_block_indexes": [1], "out_hidden_size": 64, "in_chans": 3,
}  # fmt: skip
AIMV2 = {
    "model_type": "aimv2_vision_model", "num_hidden_layers": 3, "hidden_size": 16, "intermediate_size": 24,
    "num_attention_heads": 2, "patch_size": PATCH, "is_native": True, "use_head": False, "feature_layer": -2,
    "out_hidden_size": 64,
}  # fmt: skip


def write_random(config: Any, model_class: type, directory: Path) -> Path:
    torch.manual_seed(0)
    model = model_class(config)
    for parameter in model.parameters():  # norms and biases too: a swapped pair of them must show
        torch.nn.init.normal_(parameter, 1.0 if parameter.ndim == 1 else 0.0, 0.1 if parameter.ndim == 1 else 0.2)
    model.save_pretrained(directory)
    tiny_tokenizer().save_pretrained(directory)
    pixels = {"min_pixels": 4 * 8**2, "max_pixels": 64 * 8**2, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    kind = {"image_processor_type": "Qwen2VLImageProcessor"}
    (directory / "preprocessor_config.json").write_text(json.dumps({**pixels, **kind}))
    return directory


def values(tie: bool = False) -> dict[str, Any]:
    text = copy.deepcopy(TEXT) | {"tie_word_embeddings": tie}
    return {
        "text_config": text, "vision_config": dict(VISION), "image_token_id": IMAGE_PAD,
        "video_token_id": VIDEO_PAD, "vision_start_token_id": START, "vision_end_token_id": END,
        "tie_word_embeddings": tie,
    }  # fmt: skip


@pytest.fixture(scope="module")
def qwen_vl(tmp_path_factory) -> Path:
    """A random Qwen2.5-VL, as transformers writes it."""
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    config = Qwen2_5_VLConfig(**values())
    return write_random(config, Qwen2_5_VLForConditionalGeneration, tmp_path_factory.mktemp("qwen_vl") / "hf")


def write_spatial(kind: str, directory: Path) -> Path:
    """A random model of our custom code."""
    attention, rope = SPATIAL[kind]
    axes = None if rope == "1d" else axis_of_frequency(rope, None, 8)
    how = {"visual_attention": attention, "visual_rope": rope, "rope_axes": axes}
    others: dict[str, Any] = dict.fromkeys(("vision_start_token_id", "vision_end_token_id"))
    if kind.startswith("aimv2"):
        others["vision_config"] = dict(AIMV2)
    config = SpatialQwenVLConfig(**values() | others, **how)
    return write_random(config, SpatialQwenVLForConditionalGeneration, directory)


@pytest.fixture(scope="module", params=SPATIAL)
def spatial(request, tmp_path_factory) -> Path:
    return write_spatial(request.param, tmp_path_factory.mktemp("spatial") / "hf")


def questions(directory: Path) -> list[Question]:
    """One without an image, one with one, one with two; grids that are not square."""
    generator = torch.Generator().manual_seed(1)
    merge = json.loads((directory / "config.json").read_text())["vision_config"].get("spatial_merge_size", 2)

    def pixels(*grids: tuple[int, int]) -> torch.Tensor:
        return torch.randn(sum(r * c for r, c in grids), merge**2, 3 * PATCH**2, generator=generator)

    one, two = [(2, 5)], [(3, 1), (2, 2)]
    return [
        Question(torch.tensor([5, 6, 7, 8]), None),
        Question(torch.tensor([9, START, IMAGE, END, 10, 11]), pixels(*one), one),
        Question(torch.tensor([START, IMAGE, END, 12, START, IMAGE, END, 13, 14]), pixels(*two), two),
    ]


@torch.no_grad()
def hf_inputs(question: Question) -> dict[str, torch.Tensor]:
    sizes = iter(rows * columns for rows, columns in question.grids or [])
    ids: list[int] = []
    for token in question.tokens.tolist():
        ids += [IMAGE_PAD] * next(sizes) if token == IMAGE else [token]
    given = {"input_ids": torch.tensor([ids]), "attention_mask": torch.ones(1, len(ids), dtype=torch.int64)}
    if question.pixels is not None:
        side, frames = (2, 2) if question.pixels.shape[1] == 4 else (1, 1)  # Qwen2.5-VL's tower, and AIMv2
        pixels = question.pixels.view(-1, 3, 1, PATCH**2).expand(-1, 3, frames, -1).flatten(1)
        grids = torch.tensor([[1, side * rows, side * columns] for rows, columns in question.grids])
        given |= {"pixel_values": pixels, "image_grid_thw": grids}
    return given


@torch.no_grad()
def check_same(model: Any, directory: Path, layout: dict[str, int], imported: Path) -> None:
    """Logits and greedy answers of ``transformers``' model and of the training model that is made of its files."""
    out = import_checkpoint(str(directory), str(imported))
    asked, ranks = questions(directory), layout.get("tensor", 1) * layout.get("pipeline", 1)
    told = run_on_standing_ranks(ask, ranks, str(out), layout, asked, NEW, VOCABULARY)[-1]
    assert told.cached == told.uncached
    for question, found, answer in zip(asked, told.logits, told.cached, strict=True):
        given = hf_inputs(question)
        torch.testing.assert_close(found, model(**given).logits[0], rtol=0, atol=1e-4)
        generated = model.generate(**given, max_new_tokens=NEW, do_sample=False, eos_token_id=-1, pad_token_id=0)
        assert generated[0, given["input_ids"].shape[1] :].tolist() == answer


@pytest.mark.parametrize("layout", [{}, {"tensor": 2}, {"pipeline": 2}], ids=str)
def test_logits_and_greedy_answers_of_an_imported_qwen_vl_are_those_of_transformers(layout, qwen_vl, tmp_path):
    from transformers import Qwen2_5_VLForConditionalGeneration

    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(qwen_vl).eval()
    check_same(model, qwen_vl, layout, tmp_path / "imported")


def test_logits_and_answers_of_our_custom_code_are_those_of_the_training_model(spatial, tmp_path):
    model = SpatialQwenVLForConditionalGeneration.from_pretrained(spatial).eval()
    check_same(model, spatial, {}, tmp_path / "imported")


@torch.no_grad()
def test_a_batch_of_our_custom_code_is_its_rows_padded_on_either_side_and_with_beams(spatial):
    model = SpatialQwenVLForConditionalGeneration.from_pretrained(spatial).eval()
    rows = [hf_inputs(question) for question in questions(spatial)]
    longest = max(row["input_ids"].shape[1] for row in rows)
    together = {
        name: torch.cat([row[name] for row in rows if name in row]) for name in ("pixel_values", "image_grid_thw")
    }
    for side in ("left", "right"):
        for name in ("input_ids", "attention_mask"):
            missing = [longest - row[name].shape[1] for row in rows]
            pads = [(n, 0) if side == "left" else (0, n) for n in missing]
            together[name] = torch.cat([F.pad(row[name], p) for row, p in zip(rows, pads, strict=True)])
        logits = model(**together).logits
        for row, found, real in zip(rows, logits, together["attention_mask"].bool(), strict=True):
            torch.testing.assert_close(found[real], model(**row).logits[0], rtol=0, atol=1e-4)
        if side == "left":
            how = {"max_new_tokens": NEW, "num_beams": 2, "do_sample": False, "eos_token_id": -1, "pad_token_id": 0}
            answers = model.generate(**together, **how)[:, longest:]
            alone = [model.generate(**row, **how)[0, row["input_ids"].shape[1] :] for row in rows]
            assert torch.equal(answers, torch.stack(alone))


@torch.no_grad()
def test_a_second_turn_with_an_image_of_its_own_continues_the_cache(spatial):
    model = SpatialQwenVLForConditionalGeneration.from_pretrained(spatial).eval()
    first, second = hf_inputs(questions(spatial)[1]), hf_inputs(questions(spatial)[2])
    ids = torch.cat([first["input_ids"], second["input_ids"]], dim=1)
    grids = torch.cat([first["image_grid_thw"], second["image_grid_thw"]])
    whole = model(
        input_ids=ids, pixel_values=torch.cat([first["pixel_values"], second["pixel_values"]]), image_grid_thw=grids
    )
    cache = model(**first, use_cache=True).past_key_values
    rest = {"input_ids": second["input_ids"], "sequence_ids": ids, "past_key_values": cache}
    with pytest.raises(ValueError, match="does not fit the image tokens"):
        model(**rest, pixel_values=second["pixel_values"], image_grid_thw=second["image_grid_thw"])
    with pytest.raises(ValueError, match="pass the ids of all of them as sequence_ids"):
        model(**rest | {"sequence_ids": None}, pixel_values=second["pixel_values"], image_grid_thw=grids)
    logits = model(**rest, pixel_values=second["pixel_values"], image_grid_thw=grids).logits
    torch.testing.assert_close(logits, whole.logits[:, first["input_ids"].shape[1] :], rtol=0, atol=1e-4)


def test_our_custom_code_as_plain_as_qwens_is_qwens(qwen_vl):
    from transformers import Qwen2_5_VLForConditionalGeneration

    how = {"visual_attention": "causal", "visual_rope": "mrope", "rope_axes": axis_of_frequency("mrope", None, 8)}
    ours = SpatialQwenVLForConditionalGeneration(SpatialQwenVLConfig(**values(), **how)).eval()
    plain = Qwen2_5_VLForConditionalGeneration.from_pretrained(qwen_vl).eval()
    ours.load_state_dict(plain.state_dict())
    with torch.no_grad():
        for question in questions(qwen_vl):
            given = hf_inputs(question)
            assert torch.equal(ours(**given).logits, plain(**given).logits)


@pytest.mark.parametrize(
    "changed, sentence",
    [
        ({"pixel_values": None}, "input_ids hold an image, so pass pixel_values"),
        ({"image_grid_thw": None}, "pixel_values come with image_grid_thw"),
        ({"pixel_values": None, "image_grid_thw": None}, "does not fit the image tokens of input_ids"),
        ({"image_grid_thw": torch.tensor([[1, 4, 4]])}, "does not fit the image tokens of input_ids"),
        ({"image_grid_thw": torch.tensor([[1, 4, 10], [1, 2, 2]])}, "does not fit the image tokens of input_ids"),
        ({"image_grid_thw": torch.tensor([[2, 4, 10]])}, "has a video: this model takes pictures"),
        ({"position_ids": torch.zeros(3, 1, 14)}, "Pass input_ids and none of inputs_embeds, position_ids"),
        ({"attention_mask": torch.ones(1, 3)}, "it must have"),
    ],
)
def test_what_our_custom_code_cannot_compute_it_refuses(changed, sentence, spatial):
    model = SpatialQwenVLForConditionalGeneration.from_pretrained(spatial).eval()
    with pytest.raises(ValueError, match=sentence):
        model(**hf_inputs(questions(spatial)[1]) | changed)


@pytest.mark.parametrize("kind", ["plain", "tied", "mixed 2d", "causal 1d", "causal mrope", "aimv2 mixed 2d"])
def test_an_exported_directory_is_what_was_imported(kind, qwen_vl, tmp_path):
    """Weights bit for bit under the hub's names, the model's description, and logits."""
    from transformers import AutoConfig, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    plain, source = kind not in SPATIAL, qwen_vl
    if kind == "tied":
        config = Qwen2_5_VLConfig(**values(tie=True))
        source = write_random(config, Qwen2_5_VLForConditionalGeneration, tmp_path / "source")
    elif not plain:
        source = write_spatial(kind, tmp_path / "source")
    model_class = Qwen2_5_VLForConditionalGeneration if plain else SpatialQwenVLForConditionalGeneration
    imported = import_checkpoint(str(source), str(tmp_path / "imported"))
    out = export_checkpoint(str(imported), str(tmp_path / "hf"))
    parts = {"visual", "model"} if kind == "tied" else {"visual", "model", "lm_head"}
    assert {name.split(".")[0] for name in TensorSource(out).names()} == parts
    before, after = (model_class.from_pretrained(directory) for directory in (source, out))
    expected = before.state_dict()
    assert {name: torch.equal(t, expected[name]) for name, t in after.state_dict().items()} == dict.fromkeys(
        expected, True
    )
    saved = json.loads((out / "config.json").read_text())
    assert saved["architectures"] == [model_class.__name__] and ("auto_map" in saved) != plain
    assert ("trust_remote_code" in (out / "README.md").read_text()) != plain
    assert [saved["vision_start_token_id"], saved["vision_end_token_id"]] == ([START, END] if plain else [None, None])
    if plain:
        assert type(AutoConfig.from_pretrained(out)).__name__ == "Qwen2_5_VLConfig"
    given = hf_inputs(questions(source)[2])
    with torch.no_grad():
        assert torch.equal(before.eval()(**given).logits, after.eval()(**given).logits)
    again, first = saved_model(import_checkpoint(str(out), str(tmp_path / "again"))), saved_model(imported)
    assert replace(again, name="", tokenizer="") == replace(first, name="", tokenizer="")


def test_the_description_is_the_models(qwen_vl, tmp_path):
    model = saved_model(import_checkpoint(str(qwen_vl), str(tmp_path / "imported")))
    vision = model.vision
    assert (vision.family, vision.window_size, vision.full_attention_layers) == ("qwen25_vl", 16, [1])
    assert (vision.min_visual_tokens, vision.max_visual_tokens, vision.image_mean) == (4, 64, [0.5] * 3)
    assert (model.attention, model.rope, model.rope_sections) == ("causal", "mrope", None)
    assert model.language.family == "qwen2"


@pytest.mark.parametrize("source", ["whole", "tower"])
def test_a_tower_goes_over_bit_for_bit_and_its_limits_may_change(source, qwen_vl, tmp_path):
    from transformers import Qwen2_5_VLForConditionalGeneration, Qwen2Config, Qwen2ForCausalLM

    from nemo_pre.huggingface.distributed_checkpoint import CheckpointReader

    whole = Qwen2_5_VLForConditionalGeneration.from_pretrained(qwen_vl)
    if source == "tower":
        whole.model.visual.save_pretrained(tmp_path / "tower")
        shutil.copy(qwen_vl / "preprocessor_config.json", tmp_path / "tower")
    language = Qwen2Config(
        vocab_size=VOCABULARY, hidden_size=24, intermediate_size=56, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=512,
    )  # fmt: skip
    Qwen2ForCausalLM(language).save_pretrained(tmp_path / "qwen2")
    tiny_tokenizer().save_pretrained(tmp_path / "qwen2")
    vision = str(qwen_vl if source == "whole" else tmp_path / "tower")
    with pytest.raises(ValueError, match="whose tower takes images of any size: leave it out"):
        import_checkpoint(vision=vision, language=str(tmp_path / "qwen2"), out=str(tmp_path / "no"), image_size=28)
    out = import_checkpoint(vision=vision, language=str(tmp_path / "qwen2"), out=str(tmp_path / "imported"))
    reader = CheckpointReader(out)
    found = {key for key in reader.tensors() if key.startswith("module.vision_model.")}
    expected = {
        f"module.vision_model.{name}": tensor
        for name, tensor in whole.model.visual.state_dict().items()
        if "merger.mlp" not in name
    }
    assert found == expected.keys()
    assert all(torch.equal(reader.read(key, None), tensor) for key, tensor in expected.items())
    assert reader.tensors()["module.vision_projection.0.weight"][0] == (64, 64)
    assert reader.tensors()["module.vision_projection.2.weight"][0] == (24, 64)
    model = saved_model(out)
    model.vision.max_visual_tokens = 16
    check_same_weights(model, out)
    model.vision.window_size = 32
    with pytest.raises(ValueError, match="model.vision.window_size=32 but"):
        check_same_weights(model, out)


@pytest.mark.parametrize("kind", ["mixed 2d", "aimv2 causal mrope"])
def test_an_exported_directory_alone_gives_the_same_logits_and_carries_its_code_on(kind, tmp_path):
    from transformers import AutoModelForImageTextToText

    source = write_spatial(kind, tmp_path / "source")
    imported = import_checkpoint(str(source), str(tmp_path / "imported"))
    out = export_checkpoint(str(imported), str(tmp_path / "hf"))
    given = hf_inputs(questions(source)[2])
    with pytest.raises(ValueError, match="trust_remote_code"):
        AutoModelForImageTextToText.from_pretrained(out, trust_remote_code=False)
    with torch.no_grad():
        expected = SpatialQwenVLForConditionalGeneration.from_pretrained(source).eval()(**given).logits
        model = AutoModelForImageTextToText.from_pretrained(out, trust_remote_code=True).eval()
        assert type(model) is not SpatialQwenVLForConditionalGeneration
        assert torch.equal(model(**given).logits, expected)
        model.save_pretrained(tmp_path / "again")
        again = AutoModelForImageTextToText.from_pretrained(tmp_path / "again", trust_remote_code=True).eval()
        assert torch.equal(again(**given).logits, expected)


def test_axes_that_no_sections_give_are_refused(tmp_path):
    source = write_spatial("mixed 2d", tmp_path / "source")
    saved = json.loads((source / "config.json").read_text()) | {"rope_axes": [1, 1, 2, 2, 1, 2, 1, 2]}
    (source / "config.json").write_text(json.dumps(saved))
    with pytest.raises(ValueError, match="are no consecutive sections: only such are imported"):
        read_whole(source)


# Qwen2.5-VL's own, without its videos.
PUBLISHED = (
    "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}<|im_start|>system\nYou are a "
    "helpful assistant.<|im_end|>\n{% endif %}<|im_start|>{{ message['role'] }}\n{% if message['content'] is string %}"
    "{{ message['content'] }}<|im_end|>\n{% else %}{% for content in message['content'] %}{% if content['type'] == "
    "'image' %}<|vision_start|><|image_pad|><|vision_end|>{% elif 'text' in content %}{{ content['text'] }}{% endif %}"
    "{% endfor %}<|im_end|>\n{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def test_a_prompt_is_qwen_vls_but_for_the_line_break_between_an_image_and_its_text():
    ours = jinja_template(TEMPLATES["qwen_vl"], tokenizer_adds_bos=True, image_tag="<|image_pad|>")
    text, image = {"type": "text", "text": "what is it?"}, {"type": "image"}
    for content, spoken in (([text, image], ""), ([image, text], "\n"), ([text], "")):
        rendered = [
            tiny_tokenizer().apply_chat_template(
                [{"role": "user", "content": content}], chat_template=t, tokenize=False, add_generation_prompt=True
            )
            for t in (ours, PUBLISHED)
        ]
        assert rendered[0] == rendered[1].replace("<|vision_end|>", f"<|vision_end|>{spoken}")


def test_a_model_that_no_qwen_vl_can_be_is_refused_before_anything_is_written(qwen_vl, tmp_path):
    out = import_checkpoint(str(qwen_vl), str(tmp_path / "imported"))
    (out / "config.yaml").write_text((out / "config.yaml").read_text().replace("kind: none", "kind: linear"))
    with pytest.raises(ValueError, match="is exported with a Qwen2 without rope scaling"):
        export_checkpoint(str(out), str(tmp_path / "hf"))
    assert not (tmp_path / "hf").exists()


def test_diagnosis_asks_for_the_exported_directory(qwen_vl, tmp_path):
    out = import_checkpoint(str(qwen_vl), str(tmp_path / "imported"))
    with pytest.raises(ValueError, match="export it with nemo-pre export and diagnose that directory"):
        diagnose_run(str(out), str(tmp_path / "diagnosis"))


@pytest.mark.parametrize(
    "changes, sentence",
    [
        ({"vision_config": {**VISION, "spatial_merge_size": 3}}, "spatial_merge_size=3: only spatial_merge_size=2"),
        ({"vision_config": {**VISION, "in_chans": 4}}, "in_chans=4: only in_chans=3 is imported"),
        ({"text_config": {"rope_scaling": {"type": "yarn"}}}, "only type=mrope with mrope_section is imported"),
    ],
)
def test_a_qwen_vl_of_another_kind_is_refused(changes, sentence, qwen_vl, tmp_path):
    values = json.loads((qwen_vl / "config.json").read_text())
    for part, content in changes.items():
        values[part] = {**values.get(part, {}), **content}
    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises(ValueError, match=sentence):
        import_checkpoint(str(tmp_path), str(tmp_path / "out"))


def test_the_published_7b_and_the_tied_3b_are_the_models_of_the_recipes(tmp_path):
    """Their config.json on the hub: flat, the language model's values beside the tower's."""
    published = {
        "model_type": "qwen2_5_vl", "hidden_act": "silu", "hidden_size": 3584, "intermediate_size": 18944,
        "max_position_embeddings": 128000, "num_attention_heads": 28, "num_hidden_layers": 28,
        "num_key_value_heads": 4, "rms_norm_eps": 1e-6, "rope_theta": 1e6, "use_sliding_window": False,
        "vocab_size": 152064, "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
        "image_token_id": 151655, "video_token_id": 151656, "vision_token_id": 151654,
        "vision_start_token_id": 151652, "vision_end_token_id": 151653,
        "sliding_window": 32768, "max_window_layers": 28, "attention_dropout": 0.0,
        "vision_config": {
            "depth": 32, "hidden_act": "silu", "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16,
            "in_chans": 3, "out_hidden_size": 3584, "patch_size": 14, "spatial_merge_size": 2, "window_size": 112,
            "spatial_patch_size": 14, "fullatt_block_indexes": [7, 15, 23, 31], "temporal_patch_size": 2,
        },
    }  # fmt: skip
    recipe = compose_run(["model=qwen25vl_qwen25_7b", "stage=stage1_align"]).model
    for tied in (True, False):
        (tmp_path / "config.json").write_text(json.dumps({**published, "tie_word_embeddings": tied}))
        found = read_whole(tmp_path)
        assert found.language.tie_embeddings == tied
    assert (found.vision, found.rope, found.rope_sections) == (recipe.vision, recipe.rope, recipe.rope_sections)
    language = replace(found.language, max_position_embeddings=recipe.language.max_position_embeddings)
    assert language == recipe.language
