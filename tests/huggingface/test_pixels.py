"""A published image processor's pixels are ours, wherever it lies and whichever transformers wrote it, or it is
refused.

The oracle is ``transformers``' own slow processor of the same file; a step of one in 255 is at least 0.0078 after
normalisation, and the tolerance 1e-6.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image

from nemo_pre.checks.pixels import check_pixels
from nemo_pre.config.compose import save_resolved
from nemo_pre.config.run import RunConfig
from nemo_pre.config.schema import LanguageConfig, ModelConfig, VisionConfig
from nemo_pre.config.untrained import untrained_run
from nemo_pre.data.images import image_tensor
from nemo_pre.data.native_images import NativeResolution
from nemo_pre.huggingface.pixels import NESTED, OWN, Pixels, fit_tower, read_pixels
from nemo_pre.huggingface.processor import _keep_pixels, image_processor

SIZE = 24
SHAPES = [(24, 24), (61, 40), (40, 61), (9, 13), (100, 33)]
SQUARE = {"height": SIZE, "width": SIZE}
CLIP = {
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
    "image_processor_type": "CLIPImageProcessor",
    "size": {"shortest_edge": SIZE},
    "crop_size": SQUARE,
    "resample": 3,
}
SIGLIP = {
    "image_mean": [0.5] * 3,
    "image_std": [0.5] * 3,
    "image_processor_type": "SiglipImageProcessor",
    "size": SQUARE,
    "resample": 3,
}
LLAVA = {**CLIP, "image_processor_type": "LlavaImageProcessor", "do_pad": True}
SAME = {  # by what is tried: the file, and the options it must become
    "clip": (CLIP, ("crop", "bicubic", None)),
    "clip, bilinear, other statistics": (
        {**CLIP, "resample": 2, "image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6]},
        ("crop", "bilinear", None),
    ),
    "clip, whole": ({**CLIP, "size": SQUARE, "do_center_crop": False}, ("whole", "bicubic", None)),
    "clip as first published": (
        {
            **{key: value for key, value in CLIP.items() if key != "image_processor_type"},
            **{"feature_extractor_type": "CLIPFeatureExtractor", "size": SIZE, "crop_size": SIZE},
        },
        ("crop", "bicubic", None),
    ),
    "llava, padded": (LLAVA, ("pad", "bicubic", None)),
    "llava, padded, bilinear": ({**LLAVA, "resample": 2, "image_mean": [0.3] * 3}, ("pad", "bilinear", None)),
    "llava, cropped": ({**LLAVA, "do_pad": False}, ("crop", "bicubic", None)),
    "siglip": (SIGLIP, ("whole", "bicubic", None)),
    "siglip2": ({**SIGLIP, "resample": 2}, ("whole", "bilinear", None)),
    "siglip, of transformers 5": ({**SIGLIP, "do_center_crop": None, "pad_size": None}, ("whole", "bicubic", None)),
    "vit, its own filter": (
        {
            key: value
            for key, value in {**SIGLIP, "image_processor_type": "ViTImageProcessor"}.items()
            if key != "resample"
        },
        ("whole", "bilinear", None),
    ),
    "dinov2": (
        {**CLIP, "image_processor_type": "BitImageProcessor", "size": {"shortest_edge": 28}},
        ("crop", "bicubic", 28),
    ),
    "rescaled to 2": ({**SIGLIP, "rescale_factor": 1 / 127.5, "image_mean": [1.0] * 3}, ("whole", "bicubic", None)),
    "not rescaled": ({**CLIP, "do_rescale": False}, ("crop", "bicubic", None)),
    "not normalised": ({**CLIP, "do_normalize": False}, ("crop", "bicubic", None)),
}


def picture(width: int, height: int) -> Image.Image:
    rng = np.random.default_rng([width, height])
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))


def tower(family: str = "clip", image_size: int = SIZE) -> VisionConfig:
    return VisionConfig(
        family=family, image_size=image_size, patch_size=4, hidden_size=8, intermediate_size=16, num_layers=2,
        num_attention_heads=2,
    )  # fmt: skip


def write(directory: Path, values: dict[str, Any], nested: bool = False) -> Path:
    directory.mkdir(exist_ok=True)
    if nested:
        whole = {"processor_class": "LlavaProcessor", "patch_size": 4, "image_processor": values}
        (directory / NESTED).write_text(json.dumps(whole))
    else:
        (directory / OWN).write_text(json.dumps(values))
    return directory


def theirs(values: dict[str, Any], image: Image.Image) -> torch.Tensor:
    name = values.get("image_processor_type", "CLIPImageProcessor")
    given = {key: value for key, value in values.items() if value is not None}
    found = getattr(transformers, name)(**given)(image, return_tensors="np")["pixel_values"][0]
    return torch.from_numpy(np.asarray(found)).float()


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("kind", SAME)
def test_pixels_are_those_of_the_models_own_processor(kind, nested, tmp_path):
    values, ways = SAME[kind]
    vision = tower()
    found = fit_tower(read_pixels(write(tmp_path / "hf", values, nested), vision), vision)
    assert (found.resize, found.image_filter, found.crop_from) == ways and found.size == SIZE
    for shape in SHAPES:
        image = picture(*shape)
        ours = image_tensor(image, vision.image_size, vision.image_mean, vision.image_std, "here", *ways)
        expected = theirs(values, image)
        torch.testing.assert_close(ours, expected, rtol=2e-6, atol=1e-6)


@pytest.mark.parametrize("kind", ["clip", "llava, padded, bilinear", "siglip2", "dinov2", "rescaled to 2"])
def test_an_exported_processor_makes_the_imported_ones_pixels(kind, tmp_path):
    values, _ = SAME[kind]
    model = ModelConfig(name="m", vision=tower("siglip" if "siglip" in kind else "clip"))
    pixels = fit_tower(read_pixels(write(tmp_path / "hf", values), model.vision), model.vision)
    exported = image_processor(model, pixels.data(128))
    exported.save_pretrained(tmp_path / "out")
    assert replace(read_pixels(tmp_path / "out", model.vision), where="", size=None) == replace(
        pixels, where="", size=None
    )
    for shape in SHAPES:
        image = picture(*shape)
        found = torch.from_numpy(np.asarray(exported(image, return_tensors="np")["pixel_values"][0])).float()
        torch.testing.assert_close(found, theirs(values, image), rtol=2e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({**CLIP, "image_mean": None}, "image_mean=None: it must be three numbers, which no default stands in for"),
        ({**SIGLIP, "image_std": [0.5, 0.5]}, "image_std=.* three numbers"),
        ({**SIGLIP, "image_std": [0.5, 0.5, 0]}, "image_std=.* three numbers above 0"),
        ({**SIGLIP, "image_mean": "0.5"}, "image_mean='0.5'"),
        ({**CLIP, "size": None}, "size=None"),
        ({**CLIP, "crop_size": None}, "crop_size=None"),
        ({**CLIP, "size": {"shortest_edge": 24, "longest_edge": 48}}, "size=.* shortest_edge alone"),
        ({**SIGLIP, "size": {"height": 24, "width": 32}}, "size=.* the same"),
        ({**CLIP, "crop_size": {"height": 24, "width": 32}}, "crop_size=.* the same"),
        ({**CLIP, "crop_size": 28}, "crop_size=28: it must be 24"),
        ({**CLIP, "size": SQUARE, "crop_size": 20}, "crop_size=20: it must be 24, as size"),
        ({**CLIP, "do_center_crop": False}, "do_center_crop true: the tower takes squares"),
        ({**CLIP, "do_resize": False}, "do_resize=False: it must be true"),
        ({**CLIP, "resample": 1}, r"resample=1: it must be 2 \(bilinear\) or 3 \(bicubic\)"),
        ({**CLIP, "resample": "lanczos"}, "resample='lanczos'"),
        ({**CLIP, "do_pad": True}, "do_pad=True, of which it is not known"),
        ({key: value for key, value in LLAVA.items() if key != "do_pad"}, "do_pad=None: it must be true or false"),
        ({**SIGLIP, "do_center_crop": True}, "do_center_crop=True, of which it is not known"),
        ({**CLIP, "crop_pct": 0.9}, "crop_pct=0.9, of which it is not known whether it changes pixels"),
        ({**CLIP, "do_flip_channel_order": True}, "do_flip_channel_order=True, of which"),
        ({**CLIP, "rescale_factor": 0}, "rescale_factor=0: it must be a number above 0"),
        ({**CLIP, "do_rescale": "yes"}, "do_rescale='yes': it must be true or false"),
        ({**LLAVA, "do_rescale": False}, "pads pictures whose values are not divided by 255"),
        ({**CLIP, "image_processor_type": "LlavaNextImageProcessor"}, "image_processor_type=LlavaNextImageProcessor"),
        ({**CLIP, "image_processor_type": "Qwen2VLImageProcessor"}, "keeps aspect ratios, and CLIP takes squares"),
    ],
)
def test_what_would_be_other_pixels_is_refused_by_its_name(values, sentence, tmp_path):
    for nested in (False, True):
        with pytest.raises(ValueError, match=sentence) as refused:
            read_pixels(write(tmp_path / str(nested), values, nested), tower())
        assert str(tmp_path) in str(refused.value) and "\n" not in str(refused.value)


def test_fields_that_change_nothing_are_passed_over(tmp_path):
    known = {
        "processor_class": "LlavaProcessor", "_valid_processor_keys": ["images"], "do_convert_rgb": None,
        "return_tensors": "pt", "data_format": "channels_first", "device": "cpu", "do_flip_channel_order": False,
        "image_processor_type": "CLIPImageProcessorFast", "pad_size": None, "disable_grouping": None,
    }  # fmt: skip
    plain, more = (read_pixels(write(tmp_path / n, v), tower()) for n, v in (("a", CLIP), ("b", {**CLIP, **known})))
    assert replace(plain, where="") == replace(more, where="")


def test_without_a_processor_nothing_is_assumed_and_another_can_be_named(tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    (empty / NESTED).write_text(json.dumps({"processor_class": "LlavaProcessor", "patch_size": 4}))
    with pytest.raises(ValueError, match="has no image processor .*: add the published one, or give processor=PATH"):
        read_pixels(empty, tower("siglip"))
    other = write(tmp_path / "other", SIGLIP, nested=True)
    (tmp_path / "values.json").write_text(json.dumps({**SIGLIP, "image_processor_type": None}))
    for named in (other, tmp_path / "values.json", other / NESTED):
        assert read_pixels(empty, tower("siglip"), str(named)).mean == (0.5,) * 3
    with pytest.raises(ValueError, match="processor=nowhere does not exist"):
        read_pixels(empty, tower(), "nowhere")
    with pytest.raises(ValueError, match="processor=.*empty has no image processor"):
        read_pixels(other, tower(), str(empty))


def test_two_processors_must_agree_and_a_broken_one_is_named(tmp_path):
    both = write(write(tmp_path / "both", CLIP), CLIP, nested=True)
    assert read_pixels(both, tower()).where == str(both / OWN)
    write(both, SIGLIP, nested=True)
    with pytest.raises(ValueError, match="say different things of pixels"):
        read_pixels(both, tower())
    for content in ("{", "[]", '"x"'):
        (both / OWN).write_text(content)
        with pytest.raises(ValueError, match="cannot be read|does not hold a JSON object"):
            read_pixels(both, tower())
    (both / OWN).unlink()
    (both / NESTED).write_text(json.dumps({"image_processor": [1]}))
    with pytest.raises(ValueError, match=r"image_processor=\[1\], which is no JSON object"):
        read_pixels(both, tower())


def test_the_size_is_the_processors_or_the_one_that_is_asked_for(tmp_path):
    directory = write(tmp_path / "hf", {**SAME["dinov2"][0]})
    for family, whole in (("clip", True), ("dinov2", True), ("clip", False)):
        vision = tower(family, 36)
        with pytest.raises(
            ValueError, match="makes pictures of 24 pixels and the tower's configuration has image_size=36"
        ):
            fit_tower(read_pixels(directory, vision), vision, whole=whole)
    vision = tower("dinov2", 36)
    found = fit_tower(read_pixels(directory, vision), vision, whole=False)
    assert (vision.image_size, found.crop_from) == (24, 28)
    found = fit_tower(read_pixels(directory, vision), vision, image_size=48, whole=False)
    assert (vision.image_size, found.crop_from) == (48, 56), "as much is cut off as before"


def test_native_resolution_keeps_its_limits_and_filter(tmp_path):
    values = {
        "image_processor_type": "Qwen2VLImageProcessor", "image_mean": [0.1] * 3, "image_std": [0.4] * 3,
        "size": {"shortest_edge": 4 * 64, "longest_edge": 40 * 64}, "patch_size": 4, "merge_size": 2,
        "temporal_patch_size": 2, "resample": 2,
    }  # fmt: skip
    vision = replace(tower("qwen25_vl", 0), min_visual_tokens=4, max_visual_tokens=1280)
    for nested in (False, True):
        found = fit_tower(read_pixels(write(tmp_path / str(nested), values, nested), vision), vision)
        assert (vision.min_visual_tokens, vision.max_visual_tokens, found.image_filter) == (4, 40, "bilinear")
    ours = NativeResolution(4, 2, 4, 40).patches(
        picture(61, 40), vision.image_mean, vision.image_std, "here", "bilinear"
    )
    processor = transformers.Qwen2VLImageProcessor(
        **values, min_pixels=4 * 64, max_pixels=40 * 64
    )  # 4 passes over size
    expected = processor(picture(61, 40), return_tensors="pt")["pixel_values"].view(-1, 3, 2, 16)[:, :, 0]
    torch.testing.assert_close(ours.reshape(-1, 3, 16), expected, rtol=0, atol=1e-6)
    for change, sentence in (
        ({"size": {"shortest_edge": 100, "longest_edge": 2560}}, "min_pixels=100: it must be a multiple of the 64"),
        ({"merge_size": 3}, "merge_size=3: it must be 2"),
        ({"patch_size": 14}, "patch_size=14: it must be 4"),
        ({"do_resize": False}, "do_resize=False"),
        ({"size": [1, 2]}, "size="),
        ({"fps": 2}, "fps=2, of which"),
    ):
        with pytest.raises(ValueError, match=sentence):
            read_pixels(write(tmp_path / "changed", {**values, **change}), vision)


def language() -> LanguageConfig:
    return LanguageConfig(
        num_layers=2, hidden_size=32, ffn_hidden_size=56, num_attention_heads=4, num_query_groups=2, vocab_size=300,
        max_position_embeddings=128,
    )  # fmt: skip


def imported(directory: Path, pixels: Pixels, vision: VisionConfig) -> Path:
    """The configuration that an import leaves."""
    run = RunConfig(name="m", model=ModelConfig(name="m", vision=vision, language=language()), data=pixels.data(128))
    save_resolved(run, directory / "config.yaml")
    return directory


def test_a_run_that_starts_from_an_import_shows_it_its_own_pixels(tmp_path):
    vision = tower("siglip")
    pixels = fit_tower(read_pixels(write(tmp_path / "hf", SAME["siglip2"][0]), vision), vision)
    start = imported(tmp_path / "import", pixels, vision)
    run = untrained_run(ModelConfig(name="m", vision=replace(vision), language=language()), str(tmp_path))
    run.init_from = str(start)
    with pytest.raises(
        ValueError, match=r"data.image_filter=bicubic but .* has bilinear: set data.image_filter=bilinear"
    ):
        check_pixels(run)
    run.data.image_filter = "bilinear"
    assert check_pixels(run) == []
    run.data.image_resize = "pad"
    (warning,) = check_pixels(run)
    assert warning.startswith("data.image_resize=pad where the image processor that came with init_from=")
    run.model.vision.image_mean = VisionConfig().image_mean
    with pytest.raises(
        ValueError, match=r"image_mean=.* has \[0.5, 0.5, 0.5\]: set model.vision.image_mean=\[0.5,0.5,0.5\]"
    ):
        check_pixels(run)
    run.init_from = str(tmp_path)  # a run's directory, whose recipe decided
    assert check_pixels(run) == []


def test_generation_takes_the_pixels_of_the_import(tmp_path):
    from nemo_pre.data.preprocessing import build_preprocessing
    from nemo_pre.inference import inference_run
    from tests.huggingface.tiny import tiny_tokenizer

    for kind in ("dinov2", "siglip2", "llava, padded, bilinear"):
        values, _ = SAME[kind]
        vision = tower()
        pixels = fit_tower(read_pixels(write(tmp_path / kind, values), vision), vision)
        start = imported(tmp_path / f"{kind} imported", pixels, vision)
        how = build_preprocessing(inference_run(start, str(tmp_path)), tiny_tokenizer())
        buffer = tmp_path / "x.png"
        picture(61, 40).save(buffer)
        found = how.encode_image(buffer.read_bytes(), "here")[0]
        torch.testing.assert_close(found, theirs(values, picture(61, 40)), rtol=0, atol=1e-6)


def test_an_untrained_export_carries_a_processor_that_transformers_4_finds_and_that_makes_the_imports_pixels(tmp_path):
    from transformers import AutoImageProcessor

    values, _ = SAME["siglip2"]
    model = ModelConfig(name="m", vision=tower("siglip"))
    pixels = fit_tower(read_pixels(write(tmp_path / "hf", values), model.vision), model.vision)
    cases = {
        "nested": write(tmp_path / "nested", values, nested=True),
        "none": write(tmp_path / "none", {}, nested=True),
        "another": write(tmp_path / "another", CLIP),
    }
    (cases["none"] / NESTED).write_text(json.dumps({"patch_size": 4}))
    for name, directory in cases.items():
        _keep_pixels(directory, model, pixels.data(128))
        assert name == "another" or "image_processor" not in json.loads((directory / NESTED).read_text())
        found = AutoImageProcessor.from_pretrained(directory, use_fast=False)(picture(61, 40), return_tensors="pt")
        expected = theirs(values, picture(61, 40))
        torch.testing.assert_close(found["pixel_values"][0], expected, rtol=0, atol=1e-6)
