"""The model that travels with an exported directory: every number is that of the training oracle, in any batch, with a
cache or without, and what it cannot compute it refuses.

Logits are float32 and of the order of one; transformers computes norms, softmax and angles in float32 in any case.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModel, LlavaConfig, LlavaForConditionalGeneration, StaticCache

from nemo_pre.config.derived import axis_of_frequency
from nemo_pre.huggingface.exporter import copy_own_code
from nemo_pre.huggingface.remote_code.configuration_spatial_llava import SpatialLlavaConfig
from nemo_pre.huggingface.remote_code.modeling_spatial_llava import SpatialLlavaForConditionalGeneration
from nemo_pre.huggingface.remote_code.spatial_tokens import (
    SpatialRotaryEmbedding,
    mixed_attention_mask,
    spatial_positions,
    visual_structure,
)
from tests.huggingface.tiny import IMAGE_SIZE, tiny_llava
from tests.reference.neva_laver import LaVerReferenceConfig, decode, lay_places
from tests.reference.neva_pre import LM

GRID = (4, 4)
TOKENS_PER_IMAGE = 16
PROMPTS = {  # letters are text, digits are images
    "no image": "abcdefg",
    "one image": "ab0cdef",
    "two adjacent images": "a01bc",
    "two images apart": "0ab1c",
}
CLOSE = {"rtol": 1e-4, "atol": 1e-4}


@pytest.fixture(scope="module")
def directories(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("tiny")
    return {language: tiny_llava(root / language, language) for language in ("llama", "qwen2")}


@pytest.fixture(scope="module")
def directory(directories) -> Path:
    return directories["llama"]


def spatial(directory: Path, attention: str = "mixed", rope: str = "2d", **options) -> tuple:
    """The model with the plain LLaVA's weights in ``directory``."""
    fields = LlavaConfig.from_pretrained(directory).to_dict()
    del fields["model_type"]
    axes = None if rope == "1d" else axis_of_frequency(rope, None, 4)
    config = SpatialLlavaConfig(**fields, visual_attention=attention, visual_rope=rope, rope_axes=axes, tile_grid=GRID)
    return SpatialLlavaForConditionalGeneration.from_pretrained(directory, config=config, **options).eval()


def prompt_inputs(model, prompts: list[str], pad_side: str = "left") -> dict[str, Tensor]:
    """A padded batch; every image of it is another one."""
    image_token = model.config.image_token_index
    rows, num_images = [], 0
    for prompt in prompts:
        num_images += sum(letter.isdigit() for letter in prompt)
        ids = [[image_token] * TOKENS_PER_IMAGE if letter.isdigit() else [ord(letter)] for letter in prompt]
        rows.append([number for part in ids for number in part])
    length = max(map(len, rows))
    pads = [[0] * (length - len(row)) for row in rows]
    left = pad_side == "left"
    inputs = {
        "input_ids": torch.tensor([p + row if left else row + p for row, p in zip(rows, pads, strict=True)]),
        "attention_mask": torch.tensor(
            [p + [1] * len(row) if left else [1] * len(row) + p for row, p in zip(rows, pads, strict=True)]
        ),
    }
    if num_images:
        inputs["pixel_values"] = images(num_images)
    return inputs


def images(number: int) -> Tensor:
    return torch.randn(number, 3, IMAGE_SIZE, IMAGE_SIZE, generator=torch.Generator().manual_seed(number))


# --- against the oracle ---------------------------------------------------------------------------------------------


def oracle_logits(model, inputs: dict[str, Tensor]) -> Tensor:
    """Logits ``[S, vocabulary]`` of one row without padding, from the oracle's definition of mask and positions."""
    config, text = model.config, model.config.text_config
    source, visual = [], 0
    for number in inputs["input_ids"][0].tolist():
        is_image = number == config.image_token_index
        source.append(("image", visual) if is_image else ("text", number))
        visual += is_image
    tokens = lay_places(source, GRID, config.visual_rope)
    embedding = model.get_input_embeddings().weight
    visual_nd = torch.empty(0)
    if "pixel_values" in inputs:
        visual_nd = model(**inputs).image_hidden_states.flatten(0, -2)  # the vision tower is not this test's claim
    rows = [visual_nd[value] if kind == "image" else embedding[value] for kind, value in source]
    shape = LaVerReferenceConfig(
        num_layers=text.num_hidden_layers,
        num_attention_heads=text.num_attention_heads,
        num_query_groups=text.num_key_value_heads,
        max_sequence_length=10**6,
        vision=None,
        rotary_base=10000.0,
        layernorm_epsilon=text.rms_norm_eps,
        attention=config.visual_attention,
        rope=config.visual_rope,
    )
    hidden = decode(torch.stack(rows), tokens, megatron_names(model), shape)[-1]
    return F.linear(hidden, model.lm_head.weight)


def megatron_names(model) -> dict[str, Tensor]:
    text = model.config.text_config
    found = {f"{LM}decoder.final_layernorm.weight": model.model.language_model.norm.weight}
    for number, layer in enumerate(model.model.language_model.layers):
        prefix, attention, mlp = f"{LM}decoder.layers.{number}.", layer.self_attn, layer.mlp
        for kind in ("weight", "bias"):
            parts = [getattr(p, kind) for p in (attention.q_proj, attention.k_proj, attention.v_proj)]
            if parts[0] is not None:  # rows: per query group its queries, its key, its value
                parts = [part.unflatten(0, (text.num_key_value_heads, -1)) for part in parts]
                found[f"{prefix}self_attention.linear_qkv.{kind}"] = torch.cat(parts, dim=1).flatten(0, 1)
        found[f"{prefix}self_attention.linear_proj.weight"] = attention.o_proj.weight
        found[f"{prefix}mlp.linear_fc1.weight"] = torch.cat([mlp.gate_proj.weight, mlp.up_proj.weight])
        found[f"{prefix}mlp.linear_fc2.weight"] = mlp.down_proj.weight
        found[f"{prefix}input_layernorm.weight"] = layer.input_layernorm.weight
        found[f"{prefix}pre_mlp_layernorm.weight"] = layer.post_attention_layernorm.weight
    return found


@pytest.mark.parametrize("rope", ["1d", "2d", "mrope"])
@pytest.mark.parametrize("attention", ["causal", "mixed"])
@pytest.mark.parametrize("language", ["llama", "qwen2"])
@torch.no_grad()
def test_logits_are_the_oracles(directories, language, attention, rope):
    model = spatial(directories[language], attention, rope)
    for name, prompt in PROMPTS.items():
        inputs = prompt_inputs(model, [prompt])
        torch.testing.assert_close(
            model(**inputs).logits[0], oracle_logits(model, inputs), **CLOSE, msg=lambda text, name=name: name + text
        )


@torch.no_grad()
def test_attention_and_positions_change_the_logits_where_there_is_an_image(directory):
    inputs = prompt_inputs(spatial(directory), [PROMPTS["one image"]])
    kinds = [("causal", "1d"), ("causal", "2d"), ("mixed", "1d"), ("mixed", "2d"), ("mixed", "mrope")]
    logits = [spatial(directory, *kind)(**inputs).logits[0, -1] for kind in kinds]
    for i, one in enumerate(logits):
        for other in logits[:i]:
            assert (one - other).abs().max() > 1e-2


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize(
    "scaling",
    [
        None,
        {"rope_type": "linear", "factor": 3.0},
        {"rope_type": "dynamic", "factor": 2.0},
        {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 16,
        },
        {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 16},
    ],
    ids=lambda scaling: scaling["rope_type"] if scaling else "default",
)
@torch.no_grad()
def test_causal_attention_and_1d_positions_are_stock_llava_bit_for_bit(tmp_path, implementation, scaling):
    tiny_llava(tmp_path, rope_scaling=scaling, max_position_embeddings=20)
    stock = LlavaForConditionalGeneration.from_pretrained(tmp_path, attn_implementation=implementation).eval()
    ours = spatial(tmp_path, "causal", "1d", attn_implementation=implementation)
    inputs = prompt_inputs(ours, ["abc0d"])
    assert torch.equal(ours(**inputs).logits, stock(**inputs).logits)
    inputs = prompt_inputs(ours, ["abc0d", "a", "01b"])
    if scaling is None:  # stock LLaVA's forward alone does not know that padding has no position; its generate does
        positions = (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)
        real = inputs["attention_mask"].bool()
        assert torch.equal(ours(**inputs).logits[real], stock(**inputs, position_ids=positions).logits[real])
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    assert torch.equal(ours.generate(**inputs, **options), stock.generate(**inputs, **options))


# --- positions and mask by hand -------------------------------------------------------------------------------------


def test_positions_of_the_papers_figure_text_then_a_4_by_4_image_then_text():
    ids = torch.tensor([[7, 8, *[9] * 16, 7, 8]])
    tokens = visual_structure(ids, 9, [[(4, 4)]])
    time, row, column = spatial_positions(tokens, torch.ones_like(ids).bool(), "2d")[:, 0].tolist()
    grid = [(2 + i, 2 + j) for i in range(4) for j in range(4)]
    assert list(zip(row, column, strict=True)) == [(0, 0), (1, 1), *grid, (6, 6), (7, 7)]
    assert time == [0, 1, *[2] * 16, 6, 7]


def test_what_follows_an_oblong_image_and_padding_is_at_the_largest_position_plus_one():
    pad, text, image = 0, 7, 9
    ids = torch.tensor([[pad, text, *[image] * 6, *[image] * 6, text]])
    real = ids != pad
    tokens = visual_structure(ids, image, [[(2, 3), (3, 2)]])
    position = spatial_positions(tokens, real, "2d")[:, 0]
    assert position[1].tolist() == [0, 0, 1, 1, 1, 2, 2, 2, 4, 4, 5, 5, 6, 6, 7]
    assert position[2].tolist() == [0, 0, 1, 2, 3, 1, 2, 3, 4, 5, 4, 5, 4, 5, 7]
    counted = spatial_positions(tokens, real, "1d")[:, 0]
    assert counted.tolist() == [[0, *range(14)]] * 3


def test_an_image_is_seen_whole_by_its_own_tokens_only_and_padding_by_none():
    pad, text, image = 0, 7, 9
    ids = torch.tensor([[pad, text, image, image, image, image, text]])
    seen = mixed_attention_mask(visual_structure(ids, image, [[(1, 2), (2, 1)]]).image_BS, ids != pad, num_queries=7)
    assert seen[0, 0].int().tolist() == [
        [1, 0, 0, 0, 0, 0, 0],  # padding sees itself
        [0, 1, 0, 0, 0, 0, 0],
        [0, 1, 1, 1, 0, 0, 0],
        [0, 1, 1, 1, 0, 0, 0],
        [0, 1, 1, 1, 1, 1, 0],
        [0, 1, 1, 1, 1, 1, 0],
        [0, 1, 1, 1, 1, 1, 1],
    ]


def test_image_tokens_too_few_for_an_image_are_text():
    tokens = visual_structure(torch.tensor([[9, 9, 9, 9, 7, 9], [7, 7, 7, 7, 7, 9]]), 9, [[(1, 2)] * 2, []])
    assert tokens.image_BS.tolist() == [[0, 0, 1, 1, -1, -1], [-1] * 6]
    assert tokens.advance_BS.tolist() == [[0, 2, 0, 2, 1, 1], [1] * 6]


def test_each_axis_turns_its_own_frequencies_scaled_as_the_text_model_says(tmp_path):
    config = LlavaConfig.from_pretrained(tiny_llava(tmp_path, rope_scaling={"rope_type": "linear", "factor": 2.0}))
    rotary = SpatialRotaryEmbedding(AutoModel.from_config(config.text_config).rotary_emb, [0, 1, 2, 1])
    positions = torch.tensor([[[3.0]], [[5.0]], [[7.0]]])
    cos, sin = rotary(torch.zeros(1), positions)
    angles = torch.tensor([p / 2 * 10000 ** (-2 * f / 8) for f, p in enumerate([3, 5, 7, 5])]).repeat(2)
    torch.testing.assert_close(cos[0, 0], angles.cos())
    torch.testing.assert_close(sin[0, 0], angles.sin())


# --- batches and generation -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("attention, rope", [("mixed", "2d"), ("mixed", "1d"), ("causal", "2d")])
@pytest.mark.parametrize("pad_side", ["left", "right"])
@torch.no_grad()
def test_padding_on_either_side_changes_no_logits(directory, pad_side, attention, rope, implementation):
    model = spatial(directory, attention, rope, attn_implementation=implementation)
    inputs = prompt_inputs(model, list(PROMPTS.values()), pad_side)
    logits = model(**inputs).logits
    assert logits.isfinite().all()
    pixel_values = inputs["pixel_values"]
    for row, prompt in enumerate(PROMPTS.values()):
        real = inputs["attention_mask"][row].bool()
        alone = {"input_ids": inputs["input_ids"][row, real][None]}
        own, pixel_values = pixel_values.tensor_split([sum(letter.isdigit() for letter in prompt)])
        if len(own):
            alone["pixel_values"] = own
        torch.testing.assert_close(logits[row, real], model(**alone).logits[0], **CLOSE)


def generation_options(model, **options) -> dict:
    """Exactly eight tokens, none of them an image's."""
    return {
        "max_new_tokens": 8,
        "min_new_tokens": 8,
        "do_sample": False,
        "suppress_tokens": [model.config.image_token_index],
        **options,
    }


@pytest.mark.parametrize("attention, rope", [("mixed", "2d"), ("mixed", "mrope"), ("causal", "2d"), ("mixed", "1d")])
@pytest.mark.parametrize("language", ["llama", "qwen2"])
@torch.no_grad()
def test_the_cache_changes_no_logits_of_generation(directories, language, attention, rope):
    model = spatial(directories[language], attention, rope)
    inputs = prompt_inputs(model, list(PROMPTS.values()))
    options = generation_options(model, output_logits=True, return_dict_in_generate=True)
    cached = model.generate(**inputs, **options)
    uncached = model.generate(**inputs, **options, use_cache=False)
    length = inputs["input_ids"].shape[1]
    new_ones = inputs["attention_mask"].new_ones(len(PROMPTS), cached.sequences.shape[1] - length)
    whole = model(
        input_ids=cached.sequences,
        attention_mask=torch.cat([inputs["attention_mask"], new_ones], dim=1),
        pixel_values=inputs["pixel_values"],
    ).logits[:, length - 1 : -1]
    assert torch.equal(cached.sequences, uncached.sequences)
    torch.testing.assert_close(torch.stack(cached.logits, dim=1), whole, **CLOSE)
    torch.testing.assert_close(torch.stack(uncached.logits, dim=1), whole, **CLOSE)


@torch.no_grad()
def test_greedy_generation_is_an_argmax_loop_over_whole_forwards(directory):
    model = spatial(directory)
    inputs = prompt_inputs(model, ["ab0c1d"])
    ids = inputs["input_ids"]
    for _ in range(8):
        logits = model(input_ids=ids, pixel_values=inputs["pixel_values"]).logits[:, -1]
        logits[:, [model.config.image_token_index, model.generation_config.eos_token_id]] = -torch.inf
        ids = torch.cat([ids, logits.argmax(-1, keepdim=True)], dim=1)
    assert torch.equal(model.generate(**inputs, **generation_options(model)), ids)


@pytest.mark.parametrize(
    "options",
    [{"num_beams": 2}, {"num_beams": 3, "num_return_sequences": 2}, {"do_sample": True, "num_return_sequences": 2}],
    ids=["beams", "several beams returned", "sampling"],
)
@torch.no_grad()
def test_beams_and_samples_are_the_same_without_a_cache(directory, options):
    model = spatial(directory)
    inputs = prompt_inputs(model, ["a01bc", "abcd", "ab0"])
    found = []
    for use_cache in (True, False):
        torch.manual_seed(0)
        found.append(model.generate(**inputs, **generation_options(model, **options), use_cache=use_cache))
    assert torch.equal(*found)


@torch.no_grad()
def test_beams_of_a_row_with_two_images_see_that_rows_images(directory):
    model = spatial(directory)
    inputs = prompt_inputs(model, ["a01bc", "0abc1"])
    options = generation_options(model, num_beams=2, output_scores=True, return_dict_in_generate=True)
    both = model.generate(**inputs, **options)
    for row in range(2):
        own = {"input_ids": inputs["input_ids"][row : row + 1], "pixel_values": inputs["pixel_values"][2 * row :][:2]}
        alone = model.generate(**own, **options)
        assert torch.equal(alone.sequences[0], both.sequences[row])
        torch.testing.assert_close(alone.sequences_scores[0], both.sequences_scores[row], **CLOSE)


@torch.no_grad()
def test_candidates_of_assisted_decoding_are_verified_as_greedy_generation_would(directory):
    model = spatial(directory)
    inputs = prompt_inputs(model, ["ababab0ababab"])
    options = generation_options(model)
    greedy = model.generate(**inputs, **options)
    assert torch.equal(model.generate(**inputs, **options, prompt_lookup_num_tokens=3), greedy)


# --- directories ----------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_weights_load_and_are_saved_under_the_names_of_llava_on_the_hub(directory, tmp_path):
    model = spatial(directory)
    model.save_pretrained(tmp_path / "saved")
    names = set(load_file(tmp_path / "saved" / "model.safetensors"))
    assert names == set(load_file(directory / "model.safetensors"))
    assert {name.split(".")[0] for name in names} == {"language_model", "vision_tower", "multi_modal_projector"}

    shutil.copytree(tmp_path / "saved", tmp_path / "new names")
    save_file(model.state_dict(), tmp_path / "new names" / "model.safetensors", metadata={"format": "pt"})
    inputs = prompt_inputs(model, ["ab0c"])
    expected = model(**inputs).logits
    for name in ("saved", "new names"):
        loaded, report = SpatialLlavaForConditionalGeneration.from_pretrained(
            tmp_path / name, output_loading_info=True
        )
        assert not any(report.values()), report
        assert torch.equal(loaded.eval()(**inputs).logits, expected)


STRANGER = """
import json, logging, sys
import torch
from transformers import AutoConfig, AutoModelForImageTextToText, LlavaForConditionalGeneration
from transformers.utils import logging as hf_logging

directory = sys.argv[1]
found = {}
for trust in (None, False):
    try:
        AutoModelForImageTextToText.from_pretrained(directory, trust_remote_code=trust)
    except ValueError as error:
        found[f"trust {trust}"] = str(error)

inputs = torch.load(f"{directory}/inputs.pt")
model = AutoModelForImageTextToText.from_pretrained(directory, trust_remote_code=True).eval()
with torch.no_grad():
    torch.save(model(**inputs).logits, f"{directory}/logits.pt")
    model.save_pretrained(f"{directory}/again")
    again = AutoModelForImageTextToText.from_pretrained(f"{directory}/again", trust_remote_code=True).eval()
    found["again"] = torch.equal(again(**inputs).logits, model(**inputs).logits)
found["config"] = type(AutoConfig.from_pretrained(directory, trust_remote_code=True)).__name__
found["modules"] = sorted({name.split(".")[0] for name in sys.modules} & {"nemo_pre", "nemo", "megatron"})

lines = []
class Lines(logging.Handler):
    def emit(self, record):
        lines.append(record.getMessage())
hf_logging.get_logger("transformers").addHandler(Lines())
LlavaForConditionalGeneration.from_pretrained(directory)
found["plain"] = lines
with open(f"{directory}/found.json", "w") as file:
    json.dump(found, file)
"""


@pytest.fixture(scope="module")
def stranger(directory, tmp_path_factory) -> tuple[dict, Tensor, Tensor]:
    """What a process without this project finds in an exported directory; its logits and those expected."""
    root = tmp_path_factory.mktemp("exported")
    model = spatial(directory)
    model.save_pretrained(root)
    copy_own_code("spatial_llava", root)
    config = json.loads((root / "config.json").read_text())
    config["auto_map"] = {
        "AutoConfig": "configuration_spatial_llava.SpatialLlavaConfig",
        "AutoModelForImageTextToText": "modeling_spatial_llava.SpatialLlavaForConditionalGeneration",
    }
    (root / "config.json").write_text(json.dumps(config))
    inputs = prompt_inputs(model, ["ab01c", "d", "e0f"])
    torch.save(inputs, root / "inputs.pt")
    finished = subprocess.run(
        [sys.executable, "-c", STRANGER, str(root)],
        env={**os.environ, "HF_MODULES_CACHE": str(root / "modules"), "HF_HUB_OFFLINE": "1"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        cwd=root,
    )
    assert finished.returncode == 0, finished.stderr
    with torch.no_grad():
        expected = model(**inputs).logits
    return json.loads((root / "found.json").read_text()), torch.load(root / "logits.pt"), expected


def test_the_directory_alone_gives_the_same_logits(stranger):
    found, logits, expected = stranger
    assert torch.equal(logits, expected)
    assert found["config"] == "SpatialLlavaConfig" and found["modules"] == []


def test_a_directory_saved_again_carries_its_code(stranger):
    assert stranger[0]["again"]


@pytest.mark.parametrize("trust", [None, False])
def test_the_directory_is_refused_without_trust_in_its_code(stranger, trust):
    assert "trust_remote_code=True" in stranger[0][f"trust {trust}"]


def test_a_plain_llava_warns_that_the_directory_is_of_another_model(stranger):
    warning = r"using a model of type `?spatial_llava`? to instantiate a model of type `?llava`?\."
    assert any(re.search(warning, line) for line in stranger[0]["plain"])


# --- refusals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "implementation", ["flash_attention_2", "flex_attention", {"text_config": "flash_attention_2"}], ids=str
)
def test_attention_that_takes_no_mask_is_refused(directory, implementation):
    with pytest.raises(ValueError, match="attn_implementation is 'fl.*': choose eager or sdpa"):
        spatial(directory, attn_implementation=implementation)


@torch.no_grad()
def test_attention_that_takes_no_mask_is_refused_when_chosen_later(directory):
    model = spatial(directory)
    model.model.language_model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ValueError, match="attn_implementation is 'flash_attention_2'"):
        model(**prompt_inputs(model, ["ab0c"]))


@torch.no_grad()
def test_what_would_be_computed_with_another_mask_or_other_positions_is_refused(directory):
    model = spatial(directory)
    inputs = prompt_inputs(model, ["ab0c"])
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    with pytest.raises(ValueError, match="positions follow from ids"):
        model(**inputs, position_ids=mask.cumsum(1) - 1)
    with pytest.raises(ValueError, match="positions follow from ids"):
        model(inputs_embeds=model.get_input_embeddings()(ids), attention_mask=mask)
    with pytest.raises(ValueError, match=r"attention_mask has shape \[1, 1, 19, 19\]: it must have \[1, 19\]"):
        model(**{**inputs, "attention_mask": mask[:, None, None].expand(1, 1, 19, 19)})
    with pytest.raises(ValueError, match="hold an image, so pass pixel_values"):
        model(input_ids=ids)
    with pytest.raises(ValueError, match=r"\[19\] image tokens and pixel_values 1 images: each image takes 16 tokens"):
        model(input_ids=torch.full_like(ids, model.config.image_token_index), pixel_values=inputs["pixel_values"])
    cache = StaticCache(config=model.config.text_config, max_batch_size=1, max_cache_len=32)
    with pytest.raises(ValueError, match="StaticCache has a fixed length"):
        model(**inputs, past_key_values=cache)
    with pytest.raises(ValueError, match="positions have 3 axes"):
        model.model.language_model(input_ids=ids)


@torch.no_grad()
def test_generation_that_would_be_wrong_is_refused(directory):
    model = spatial(directory)
    inputs = prompt_inputs(model, ["ab0cdef"])
    options = generation_options(model)
    with pytest.raises(ValueError, match="has a fixed length: leave cache_implementation out"):
        model.generate(**inputs, **options, cache_implementation="static")
    with pytest.raises(ValueError, match=r"image tokens|position_ids|[Cc]hunk"):
        model.generate(**inputs, **options, prefill_chunk_size=8)
    embeds = model.get_input_embeddings()(inputs["input_ids"])
    with pytest.raises(ValueError, match="inputs_embeds"):
        model.generate(inputs_embeds=embeds, attention_mask=inputs["attention_mask"], **options)


@torch.no_grad()
def test_a_decoding_step_without_the_ids_so_far_is_refused_and_with_them_right(directory):
    model = spatial(directory)
    inputs = prompt_inputs(model, ["ab0cdef"])
    ids, new = inputs["input_ids"], torch.tensor([[77]])
    longer = torch.cat([ids, new], dim=1)
    cache = model(**inputs, use_cache=True).past_key_values
    with pytest.raises(ValueError, match="22 tokens are cached and 1 are new: pass the ids of all of them"):
        model(input_ids=new, past_key_values=cache)
    step = model(input_ids=new, past_key_values=cache, sequence_ids=longer).logits
    whole = model(input_ids=longer, pixel_values=inputs["pixel_values"]).logits
    torch.testing.assert_close(step[:, -1], whole[:, -1], **CLOSE)


@torch.no_grad()
def test_a_second_turn_with_an_image_of_its_own_continues_the_cache(directory):
    model = spatial(directory)
    whole = prompt_inputs(model, ["ab0cd1ef"])
    ids, pixel_values = whole["input_ids"], whole["pixel_values"]
    first = ids.shape[1] - (TOKENS_PER_IMAGE + 3)
    cache = model(input_ids=ids[:, :first], pixel_values=pixel_values[:1], use_cache=True).past_key_values
    second = model(
        input_ids=ids[:, first:], pixel_values=pixel_values[1:], past_key_values=cache, sequence_ids=ids
    ).logits
    torch.testing.assert_close(second, model(**whole).logits[:, first:], **CLOSE)


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"visual_attention": "full"}, "visual_attention is 'full': choose causal or mixed"),
        ({"visual_rope": "3d"}, "visual_rope is '3d': choose 1d, 2d or mrope"),
        ({"visual_rope": "1d", "rope_axes": [0] * 64}, "must be null for visual_rope=1d"),
        ({"visual_rope": "2d"}, "rope_axes=None must be 64 numbers"),
        ({"visual_rope": "2d", "rope_axes": [1, 2]}, "must be 64 numbers"),
        ({"visual_rope": "2d", "rope_axes": [3] * 64}, "must be 64 numbers"),
        ({"tile_grid": [24]}, "must be two positive numbers"),
        ({"tile_grid": [24, 23]}, "must have as many tokens as image_seq_length=576"),
        ({"text_config": {"model_type": "mistral"}}, "text model is 'mistral': it must be one of llama, qwen2"),
        ({"text_config": {"model_type": "qwen2", "use_sliding_window": True}}, "use_sliding_window must be false"),
    ],
)
def test_a_configuration_that_makes_no_model_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        SpatialLlavaConfig(**fields)
