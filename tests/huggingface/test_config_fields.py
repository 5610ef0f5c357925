"""Every field of a config.json is read, of no consequence, or refused by name, in one sentence whatever it holds."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from nemo_pre.config.schema import ModelConfig
from nemo_pre.huggingface import config_tables as tables
from nemo_pre.huggingface.architecture import read_parts, read_whole
from nemo_pre.huggingface.config_fields import Only, Read, Table
from nemo_pre.huggingface.rope_fields import TYPES
from tests.huggingface.make_transformers5_fixtures import ROOT

LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip
MROPE = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 3, 3]}
TEXT: dict[str, Any] = {
    "vocab_size": 300, "hidden_size": 64, "intermediate_size": 56, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 512,
}  # fmt: skip
SIZES = {"hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2, "image_size": 16, "patch_size": 4}
TOWERS: dict[str, dict[str, Any]] = {
    "clip": {"model_type": "clip_vision_model", "intermediate_size": 40, **SIZES},
    "siglip": {"model_type": "siglip_vision_model", "intermediate_size": 40, **SIZES},
    "dinov2": {"model_type": "dinov2", "mlp_ratio": 2, **SIZES},
    "aimv2": {"model_type": "aimv2_vision_model", "intermediate_size": 40, **SIZES},
    "patch_mlp": {"model_type": "patch_mlp", "image_size": 16, "patch_size": 4},
    "qwen25_vl": {
        "model_type": "qwen2_5_vl", "depth": 3, "hidden_size": 16, "intermediate_size": 24, "num_heads": 2,
        "patch_size": 4, "window_size": 16, "fullatt_block_indexes": [1],
    },
}  # fmt: skip
LLAMA = {"model_type": "llama", **TEXT, "rope_parameters": LLAMA3}
QWEN2 = {"model_type": "qwen2", **TEXT, "rope_theta": 1e6}
LLAVA = {
    "model_type": "llava", "text_config": LLAMA, "vision_config": TOWERS["clip"], "image_token_index": 290,
}  # fmt: skip
SPATIAL = {**LLAVA, "model_type": "spatial_llava", "tile_grid": [4, 4]}
QWEN_VL = {
    "model_type": "qwen2_5_vl", "text_config": {**TEXT, "rope_parameters": MROPE},
    "vision_config": TOWERS["qwen25_vl"], "image_token_id": 290,
}  # fmt: skip
FLAT = {**QWEN_VL, **TEXT, "rope_theta": 1e6, "rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]}}
del FLAT["text_config"]


def whole(directory: Path) -> ModelConfig:
    return read_whole(directory)


def language(directory: Path) -> ModelConfig:
    return read_parts(Path("patch_mlp"), directory, "fresh")


def tower(directory: Path) -> ModelConfig:
    (directory / "language").mkdir(exist_ok=True)
    (directory / "language" / "config.json").write_text(json.dumps(LLAMA))
    return read_parts(directory, directory / "language", "fresh")


# the file, where in it the fields lie, which they are, and how it is read
PLACES: dict[str, tuple[dict[str, Any], tuple[str, ...], Table, Callable[[Path], ModelConfig]]] = {
    "llama": (LLAMA, (), tables.LLAMA, language),
    "qwen2": (QWEN2, (), tables.QWEN2, language),
    "llama3 scaling": (LLAMA, ("rope_parameters",), TYPES["llama3"], language),
    "linear scaling": (
        {**QWEN2, "rope_scaling": {"type": "linear", "factor": 2.0}},
        ("rope_scaling",),
        TYPES["linear"],
        language,
    ),
    "llava": (LLAVA, (), tables.LLAVA, whole),
    "llava's text": (LLAVA, ("text_config",), tables.LLAMA, whole),
    "llava's tower": (LLAVA, ("vision_config",), tables.CLIP, whole),
    "spatial llava": (SPATIAL, (), tables.SPATIAL_LLAVA, whole),
    "llava as a tower": (LLAVA, ("vision_config",), tables.CLIP, tower),
    "whole clip": (
        {"model_type": "clip", "vision_config": TOWERS["clip"]},
        ("vision_config",),
        tables.CLIP,
        tower,
    ),
    "qwen_vl": (QWEN_VL, (), {**tables._QWEN_VL_OWN}, whole),
    "qwen_vl's text": (QWEN_VL, ("text_config",), tables.QWEN_VL_TEXT, whole),
    "qwen_vl's sections": (QWEN_VL, ("text_config", "rope_parameters"), TYPES["mrope"], whole),
    "qwen_vl's tower": (QWEN_VL, ("vision_config",), tables.QWEN_VL_TOWER, whole),
    "flat qwen_vl": (FLAT, (), tables.QWEN_VL_FLAT, whole),
    **{name: (TOWERS[name], (), table, tower) for name, table in tables.TOWERS.items()},
}
WRONG = (
    None, [], [1], ["x"], [[1, 2]], [None], "", "x", "64", 0, -1, -7, True, False, {}, {"x": 1}, 1.5, 0.1, 1e-9, 1e40,
    2**40, float("nan"), float("inf"), [-1], [2.5], [True],
)  # fmt: skip


def with_value(place: str, name: str, value: Any) -> dict[str, Any]:
    values = copy.deepcopy(PLACES[place][0])
    inner = values
    for part in PLACES[place][1]:
        inner = inner[part]
    inner[name] = value
    return values


def told(place: str, values: Any, directory: Path) -> str | None:
    """The sentence it is refused with; None: it is read."""
    path = directory / "config.json"
    path.write_text(json.dumps(values))
    try:
        assert isinstance(PLACES[place][3](directory), ModelConfig)
    except ValueError as error:
        sentence = str(error)
        assert "\n" not in sentence and sentence.endswith("."), sentence
        assert str(directory) in sentence and len(sentence) < 600, sentence
        return sentence
    return None


@pytest.mark.parametrize("place", PLACES)
def test_a_field_that_holds_what_it_cannot_is_refused_in_a_sentence_that_names_it(place, tmp_path):
    assert told(place, PLACES[place][0], tmp_path) is None
    for name, field in PLACES[place][2].items():
        if not isinstance(field, Read | Only):
            continue
        for wrong in WRONG:
            said = told(place, with_value(place, name, wrong), tmp_path)
            if isinstance(field, Read) and field.kind.accepts(wrong):
                continue  # of the right kind: read, or refused for another reason, but no traceback
            if isinstance(field, Only) and said is None:
                assert any(wrong == each for each in (field.value, *field.also)), (name, wrong)
                continue
            named = ("model_type", "of type") if name == "model_type" else (name,)
            assert said is not None and any(each in said for each in named), (name, wrong, said)


@pytest.mark.parametrize("place", PLACES)
def test_a_field_that_nobody_knows_is_refused_unless_it_says_nothing(place, tmp_path):
    assert "has surprise, of which" in (told(place, with_value(place, "surprise", 1), tmp_path) or "")
    assert told(place, with_value(place, "surprise", None), tmp_path) is None


@pytest.mark.parametrize(
    ("place", "name", "value"),
    [
        ("qwen2", "use_sliding_window", True),
        ("qwen2", "layer_types", ["full_attention", "sliding_attention"]),
        ("llama", "sliding_window", 4096),
        ("llama", "partial_rotary_factor", 0.5),
        ("llama3 scaling", "partial_rotary_factor", 0.5),
        ("llama", "attn_logit_softcapping", 50.0),
        ("llama", "query_pre_attn_scalar", 256),
        ("llama", "quantization_config", {"quant_method": "gptq"}),
        ("llama", "attention_bias", True),
        ("llama", "mlp_bias", True),
        ("llama", "head_dim", 32),
        ("llama", "attention_dropout", 0.1),
        ("llama", "is_causal", False),
        ("llama", "num_key_value_heads", 3),
        ("llama", "num_attention_heads", 3),
        ("llava's text", "hidden_act", "gelu"),
        ("clip", "hidden_act", "gelu"),
        ("clip", "layer_norm_eps", 1e-6),
        ("clip", "attention_dropout", 0.1),
        ("siglip", "hidden_act", "gelu"),
        ("dinov2", "mlp_ratio", 2.03),
        ("qwen_vl's sections", "mrope_section", [2, 3, 4]),
        ("qwen_vl's tower", "rope_parameters", {"rope_theta": 1e5, "rope_type": "axial"}),
    ],
)
def test_what_our_layers_do_not_compute_is_refused_by_name(place, name, value, tmp_path):
    assert name in (told(place, with_value(place, name, value), tmp_path) or "")


def test_both_spellings_of_rotary_positions_are_one_and_may_not_contradict(tmp_path):
    old = {key: value for key, value in LLAMA3.items() if key != "rope_theta"}
    spelt = [
        {**LLAMA, "rope_parameters": LLAMA3},
        {**LLAMA, "rope_parameters": None, "rope_theta": 5e5, "rope_scaling": old},
        {**LLAMA, "rope_parameters": old, "rope_theta": 5e5},
        {**LLAMA, "rope_parameters": LLAMA3, "rope_theta": 5e5, "rope_scaling": old},
    ]
    found = []
    for values in spelt:
        (tmp_path / "config.json").write_text(json.dumps(values))
        found.append(language(tmp_path).language)
    assert found[0].rotary_base == 5e5 and found[0].rope_scaling.factor == 8.0
    assert all(each == found[0] for each in found)
    for values, sentence in (
        ({**LLAMA, "rope_theta": 1e4}, "which say something else"),
        ({**LLAMA, "rope_scaling": {"type": "linear", "factor": 2.0}}, "which say something else"),
        ({**LLAMA, "rope_parameters": old}, "rope_parameters without rope_theta"),
        ({**LLAMA, "rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "of type yarn: only linear"),
        ({**LLAMA, "rope_parameters": {"rope_type": "linear", "type": "yarn"}}, "of types linear and yarn"),
        ({**LLAMA, "rope_parameters": {"full_attention": {"rope_theta": 1e4}, "rope_theta": 1e4}}, "full_attention"),
        ({**LLAMA, "rope_parameters": MROPE}, "mrope_section=.* is a Qwen2.5-VL's"),
    ):
        said = told("llama", values, tmp_path) or ""
        assert pytest.raises(ValueError, language, tmp_path).match(sentence), said


def test_what_is_said_twice_must_be_the_same(tmp_path):
    for place, values, sentence in (
        ("qwen_vl", {**QWEN_VL, "hidden_size": 32}, "hidden_size=32, but text_config says 64"),
        ("llava", {**LLAVA, "tie_word_embeddings": True}, None),
        (
            "llava",
            {**LLAVA, "tie_word_embeddings": True, "text_config": {**LLAMA, "tie_word_embeddings": False}},
            "tie_word_embeddings=True, but another value in text_config",
        ),
        (
            "whole clip",
            {**PLACES["whole clip"][0], "vision_config_dict": {"patch_size": 14}},
            "patch_size=4, but vision_config_dict says 14",
        ),
    ):
        said = told(place, values, tmp_path)
        assert said is None if sentence is None else sentence in (said or "")


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"[]", "does not hold a JSON object"),
        (b"null", "does not hold a JSON object"),
        (b"{", "cannot be read"),
        (b"", "cannot be read"),
        (b"\xff\xfe", "cannot be read"),
        (b"[" * 200_000, "cannot be read"),
        (None, "does not exist"),
    ],
)
def test_a_file_that_is_no_configuration_is_named(content, sentence, tmp_path):
    if content is not None:
        (tmp_path / "config.json").write_bytes(content)
    for read in (whole, language, tower):
        with pytest.raises(ValueError, match=rf"^{tmp_path}/config.json {sentence}.*\.$"):
            read(tmp_path)


def classes() -> Iterator[tuple[Table, Any]]:
    import transformers
    from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLTextConfig, Qwen2_5_VLVisionConfig

    yield from (
        (tables.LLAMA, transformers.LlamaConfig()),
        (tables.QWEN2, transformers.Qwen2Config()),
        (tables.QWEN_VL_TEXT, Qwen2_5_VLTextConfig()),
        (tables.CLIP, transformers.CLIPVisionConfig()),
        (tables.SIGLIP, transformers.SiglipVisionConfig()),
        (tables.DINOV2, transformers.Dinov2Config()),
        (tables.AIMV2, transformers.Aimv2VisionConfig()),
        (tables.QWEN_VL_TOWER, Qwen2_5_VLVisionConfig()),
        (tables.WHOLE_TOWER, transformers.CLIPConfig()),
        (tables.WHOLE_TOWER, transformers.SiglipConfig()),
        (tables.LLAVA, transformers.LlavaConfig()),
    )


def test_what_is_left_out_is_what_transformers_takes_and_all_that_it_writes_is_known():
    for table, config in classes():
        written = config.to_dict()
        assert {name for name, value in written.items() if name not in table and value is not None} == set(), config
        for name, field in table.items():
            if name not in written or name in ("model_type", "rope_theta", "tie_word_embeddings"):
                continue
            if isinstance(field, Read) and isinstance(field.default, int | float | str | list):
                assert field.default == written[name], (type(config), name)
            if isinstance(field, Only):
                assert written[name] in (field.value, *field.also), (type(config), name)


def test_all_that_transformers_5_writes_is_known():
    for directory in sorted(path for path in ROOT.iterdir() if path.is_dir()):
        values = json.loads((directory / "config.json").read_text())
        if values["model_type"] in ("llava", "qwen2_5_vl"):
            assert read_whole(directory).language.hidden_size == 32
        elif values["model_type"] == "qwen2":
            assert language(directory).language.rotary_base == 1e6
        else:
            assert read_parts(directory, ROOT / "qwen2", "fresh").vision.num_layers == 3
