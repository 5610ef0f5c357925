"""transformers and our Megatron model say the same of the same weights: logits to 1e-4 in float32 (of about 5), greedy
answers token for token, whatever layout the model is laid out in."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from nemo_pre.config.derived import axis_of_frequency
from nemo_pre.huggingface.importer import import_checkpoint
from tests.huggingface.megatron_ranks import Question, ask
from tests.huggingface.tiny import IMAGE_SIZE, tiny_llava, tiny_processor
from tests.ranks import run_on_standing_ranks

IMAGE, VISUAL, VOCABULARY, NEW = -200, 16, 300, 6
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama_clip": {"language": "llama", "vision": "clip"},
    "qwen2_siglip": {"language": "qwen2", "vision": "siglip"},
    "qwen2_clip_tied": {"language": "qwen2", "vision": "clip", "tie": True},
    "llama_clip_rope_llama3": {"language": "llama", "vision": "clip", "rope_scaling": LLAMA3},
    "llama_clip_rope_linear": {
        "language": "llama",
        "vision": "clip",
        "rope_scaling": {"rope_type": "linear", "factor": 2.0},
    },
    "qwen2_siglip_mixed_2d": {"language": "qwen2", "vision": "siglip", "spatial": ("mixed", "2d")},
    "llama_clip_mixed_mrope": {"language": "llama", "vision": "clip", "spatial": ("mixed", "mrope")},
    "llama_dinov2": {"language": "llama", "vision": "dinov2"},
    "qwen2_aimv2": {"language": "qwen2", "vision": "aimv2"},
    "qwen2_dinov2_mixed_2d": {"language": "qwen2", "vision": "dinov2", "spatial": ("mixed", "2d")},
}
LAYOUTS = {
    "llama_clip": [{}, {"tensor": 2}, {"pipeline": 2}],
    "qwen2_siglip_mixed_2d": [{}, {"tensor": 2}, {"pipeline": 2}],
}
CASES = [(family, layout) for family in FAMILIES for layout in LAYOUTS.get(family, [{}])]
CASES.sort(key=lambda case: len(case[1]))  # one rank first: ranks that stand take jobs of their number


def questions() -> list[Question]:
    """Text alone, one image, two images side by side, and an image at the end; of several lengths."""
    generator = torch.Generator().manual_seed(5)
    text = [torch.randint(4, 250, (length,), generator=generator).tolist() for length in (9, 5, 7, 3)]
    layouts = [text[0], [*text[1], IMAGE, 20, 21], [7, IMAGE, IMAGE, *text[2]], [*text[3], IMAGE]]
    pixels = [torch.randn(ids.count(IMAGE), 3, IMAGE_SIZE, IMAGE_SIZE, generator=generator) for ids in layouts]
    return [
        Question(torch.tensor(ids), images if len(images) else None)
        for ids, images in zip(layouts, pixels, strict=True)
    ]


def written(directory: Path, spatial: tuple[str, str] | None = None, **options: Any) -> Path:
    """A tiny directory; with ``spatial`` (attention, rope) that of our custom code."""
    tiny_llava(directory, **options)
    if spatial is not None:
        from nemo_pre.huggingface.remote_code.configuration_spatial_llava import SpatialLlavaConfig

        attention, rope = spatial
        values = json.loads((directory / "config.json").read_text()) | {
            "model_type": SpatialLlavaConfig.model_type,
            "visual_attention": attention,
            "visual_rope": rope,
            "rope_axes": axis_of_frequency(rope, None, 4),
            "tile_grid": [4, 4],
        }
        SpatialLlavaConfig.from_dict(values).save_pretrained(directory)
    return directory


def hf_model(directory: Path, spatial: bool) -> Any:
    if spatial:
        from nemo_pre.huggingface.remote_code.modeling_spatial_llava import SpatialLlavaForConditionalGeneration

        return SpatialLlavaForConditionalGeneration.from_pretrained(directory).eval()
    from transformers import LlavaForConditionalGeneration

    return LlavaForConditionalGeneration.from_pretrained(directory).eval()


def expanded(question: Question, image_token: int) -> torch.Tensor:
    ids: list[int] = []
    for token in question.tokens.tolist():
        ids += [image_token] * VISUAL if token == IMAGE else [token]
    return torch.tensor(ids)


@torch.no_grad()
def hf_logits(model: Any, question: Question) -> torch.Tensor:
    ids = expanded(question, model.config.image_token_index)
    mask = torch.ones_like(ids)[None]
    return model(input_ids=ids[None], attention_mask=mask, pixel_values=question.pixels).logits[0]


@pytest.fixture(scope="module")
def directories(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("llava")
    for family, options in FAMILIES.items():
        import_checkpoint(str(written(root / family, **options)), str(root / f"{family}_imported"))
    return {family: root / family for family in FAMILIES}


@pytest.mark.parametrize("family, layout", CASES, ids=lambda value: str(value))
def test_logits_and_greedy_answers_are_those_of_transformers(family, layout, directories):
    asked = questions()
    ranks = layout.get("tensor", 1) * layout.get("pipeline", 1)
    checkpoint = directories[family].with_name(f"{family}_imported")
    told = run_on_standing_ranks(ask, ranks, str(checkpoint), layout, asked, NEW, VOCABULARY)[-1]
    model = hf_model(directories[family], "spatial" in FAMILIES[family])
    for question, found in zip(asked, told.logits, strict=True):
        expected = hf_logits(model, question)
        assert found.shape == expected.shape
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
    assert told.cached == told.uncached
    for question, answer in zip(asked, told.cached, strict=True):
        ids = expanded(question, model.config.image_token_index)[None]
        given = {} if question.pixels is None else {"pixel_values": question.pixels}
        generated = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=NEW,
            do_sample=False,
            eos_token_id=-1,
            **given,
        )
        assert generated[0, ids.shape[1] :].tolist() == answer


@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_padding_on_either_side_gives_transformers_the_logits_of_megatron(side, directories):
    """Megatron's prompts are padded on the right; a batch of transformers may be padded on either side."""
    asked = questions()
    told = run_on_standing_ranks(
        ask, 1, str(directories["llama_clip"].with_name("llama_clip_imported")), {}, asked, 1, VOCABULARY
    )
    model = hf_model(directories["llama_clip"], spatial=False)
    rows = [expanded(question, model.config.image_token_index) for question in asked]
    longest = max(map(len, rows))
    ids, mask = torch.zeros(len(rows), longest, dtype=torch.int64), torch.zeros(len(rows), longest, dtype=torch.int64)
    places = [slice(longest - len(row), longest) if side == "left" else slice(0, len(row)) for row in rows]
    for number, (row, place) in enumerate(zip(rows, places, strict=True)):
        ids[number, place], mask[number, place] = row, 1
    pixels = torch.cat([question.pixels for question in asked if question.pixels is not None])
    logits = model(
        input_ids=ids, attention_mask=mask, pixel_values=pixels, position_ids=(mask.cumsum(1) - 1).clamp(min=0)
    ).logits
    for number, place in enumerate(places):
        torch.testing.assert_close(logits[number, place], told[0].logits[number], rtol=0, atol=1e-4)


def test_our_pixels_are_those_of_the_image_processor():
    """CLIP and SigLIP, bicubic and whole: to 1e-6 (float32 rounding of the normalisation)."""
    import io

    import numpy as np
    from PIL import Image

    from nemo_pre.data.images import image_tensor

    picture = Image.fromarray(np.random.default_rng(3).integers(0, 256, (37, 52, 3), dtype=np.uint8))
    buffer = io.BytesIO()
    picture.save(buffer, "png")
    for vision in ("clip", "siglip"):
        processor = tiny_processor(vision).image_processor
        expected = processor(picture, return_tensors="pt")["pixel_values"][0]
        found = image_tensor(buffer.getvalue(), IMAGE_SIZE, processor.image_mean, processor.image_std, "here")
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
