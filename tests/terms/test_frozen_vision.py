"""Frozen vision models: patches, pixels, and what is refused; tiny random ones of transformers' classes."""

from __future__ import annotations

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import transformers
from torch.utils.flop_counter import FlopCounterMode

from nemo_pre.objectives.target import Target
from nemo_pre.terms.frozen_vision import FrozenVision, load_model
from nemo_pre.terms.vision_facts import check_files, read_statistics, vision_facts

SMALL = dict(hidden_size=24, num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=7)
MLP = dict(intermediate_size=32)
TEXT = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=30)
OWN_MEAN, OWN_STD = [0.4, 0.5, 0.6], [0.2, 0.25, 0.3]  # of the frozen model
MEAN, STD = [0.1, 0.2, 0.3], [0.5, 0.6, 0.7]  # of the trained one
SAM = dict(
    image_size=64, patch_size=16, hidden_size=24, output_channels=20, num_hidden_layers=1, num_attention_heads=2,
    global_attn_indexes=[0], window_size=2, mlp_dim=48,
)  # fmt: skip


def sam():
    config = transformers.SamConfig(vision_config=transformers.SamVisionConfig(**SAM).to_dict())
    return transformers.SamModel(config)


def both(family):
    """A model of pictures and text, such as published CLIP and SigLIP directories hold."""
    config = getattr(transformers, f"{family}Config")(text_config={**TEXT}, vision_config={**SMALL, **MLP})
    return getattr(transformers, f"{family}Model")(config)


def made(name, **more):
    return getattr(transformers, f"{name}Model")(getattr(transformers, f"{name}Config")(**SMALL, **more))


MODELS = {  # how to make it, tokens before the patches
    "dinov2": (lambda: made("Dinov2"), 1),
    "dinov2_with_registers": (lambda: made("Dinov2WithRegisters", num_register_tokens=4), 5),
    "dinov3": (lambda: made("DINOv3ViT", num_register_tokens=3, **MLP), 4),
    "clip": (lambda: both("CLIP"), 1),
    "clip_vision": (lambda: made("CLIPVision", **MLP), 1),
    "siglip": (lambda: both("Siglip"), 0),
    "siglip_vision": (lambda: made("SiglipVision", **MLP), 0),
    "aimv2_vision": (lambda: made("Aimv2Vision", use_head=False, **MLP), 0),
    "vit": (lambda: made("ViT", **MLP), 1),
    "vit_mae": (lambda: made("ViTMAE", **MLP), 1),
    "deit": (lambda: made("DeiT", **MLP), 2),
    "ijepa": (lambda: made("IJepa", **MLP), 0),
}


def saved(path, model, statistics=True):
    torch.manual_seed(5)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(path)
    if statistics:
        (path / "preprocessor_config.json").write_text(json.dumps({"image_mean": OWN_MEAN, "image_std": OWN_STD}))
    return model.eval()


def target(path, image_size=None, **more):
    return Target("viral", "objective.viral.target", str(path), image_size, **more)


def frozen(wanted):
    return FrozenVision(wanted, torch.device("cpu"), MEAN, STD)


def column(values):
    return torch.tensor(values).view(3, 1, 1).double()


def picture_in_float64(images):
    """From the trained model's normalisation to the frozen one's."""
    return (images.double() * column(STD) + column(MEAN) - column(OWN_MEAN)) / column(OWN_STD)


@pytest.mark.parametrize("name", MODELS)
def test_features_are_the_patches_of_the_last_hidden_state_of_transformers_own_forward(name, tmp_path):
    make, prefix = MODELS[name]
    model = saved(tmp_path, make()).double()
    images = torch.randn(3, 3, 28, 28)
    found = frozen(target(tmp_path))(images, tile_tokens=16)
    part = getattr(model, "vision_model", model)
    more = {}
    if name == "vit_mae":
        part.config.mask_ratio = 0.0
        more["noise"] = torch.arange(16.0).expand(3, 16)
    expected = part(pixel_values=picture_in_float64(images), **more).last_hidden_state[:, prefix:]
    assert found.shape == (3, 16, 24) and found.dtype == torch.float32 and not found.requires_grad
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=2e-5 * float(expected.detach().abs().max()))


def test_masked_autoencoders_see_every_patch_in_its_place_and_nothing_is_drawn(tmp_path):
    saved(tmp_path, MODELS["vit_mae"][0]())
    wanted = frozen(target(tmp_path))
    image = torch.randn(1, 3, 28, 28)
    assert torch.equal(wanted(image, 16), wanted(image, 16))
    changed = image.clone()
    changed[..., 7:14, 14:21] += 3.0  # the patch in row 1 and column 2 of 4 x 4
    assert int((wanted(changed, 16) - wanted(image, 16)).norm(dim=-1).argmax()) == 6


@pytest.mark.parametrize("whole", [True, False])
def test_sams_map_is_resampled_to_the_grid_of_visual_tokens(whole, tmp_path):
    model = sam() if whole else transformers.SamVisionModel(transformers.SamVisionConfig(**SAM))
    model = saved(tmp_path, model).double()
    images = torch.randn(2, 3, 64, 64)
    assert vision_facts(target(tmp_path)).width == 20
    output = model.vision_encoder(picture_in_float64(images)).last_hidden_state
    expected = output.reshape(2, 20, 2, 2, 2, 2)
    found = frozen(target(tmp_path))(images, tile_tokens=16)
    torch.testing.assert_close(found.double(), output.flatten(2).transpose(1, 2), rtol=0, atol=1e-4)
    # Half the grid, antialiased: a triangle of four places along each side, cut at the border: weights 3, 3, 1 of 7.
    weights = torch.tensor([[3, 3, 1, 0], [0, 1, 3, 3]]).double() / 7
    expected = torch.einsum("ri,cj,ndij->nrcd", weights, weights, output).flatten(1, 2)
    found = frozen(target(tmp_path))(images, tile_tokens=4)
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-4)


def test_resampling_keeps_the_places_of_patches(tmp_path):
    """Features that say where they are (row, column of an 8x8 grid) say so still on a 4x4 grid."""
    saved(tmp_path, MODELS["dinov2_with_registers"][0]())
    wanted = frozen(target(tmp_path, image_size=56))
    row, column = torch.meshgrid(torch.arange(8.0), torch.arange(8.0), indexing="ij")
    places = torch.stack([row, column], dim=-1).reshape(1, 64, 2)
    tokens = torch.cat([torch.full((1, 5, 2), -100.0), places], dim=1)  # class and register tokens come first
    config = wanted.model.config

    class Says:
        def __init__(self):
            self.config = config

        def forward(self, pixel_values):
            return SimpleNamespace(last_hidden_state=tokens)

        __call__ = forward

    wanted.model = Says()
    resampled = wanted(torch.zeros(1, 3, 28, 28), tile_tokens=16).view(4, 4, 2)
    expected = torch.stack(torch.meshgrid(*[torch.tensor([2.5, 4.5])] * 2, indexing="ij"), dim=-1)
    torch.testing.assert_close(resampled[1:3, 1:3], expected)  # the border is averaged over fewer neighbours
    assert (resampled.diff(dim=0)[..., 0] > 0).all() and (resampled.diff(dim=1)[..., 1] > 0).all()


@pytest.mark.parametrize("image_filter", ["bicubic", "bilinear"])
def test_the_picture_is_resized_with_the_named_filter_as_pillow_does(image_filter, tmp_path):
    """Pillow's filters are antialiased; both are compared on a ramp and noise, where the filters differ."""
    import numpy as np
    from PIL import Image

    saved(tmp_path, made("Dinov2"))
    wanted = frozen(target(tmp_path, 14, image_filter=image_filter))
    picture = torch.rand(1, 3, 28, 28)
    pixels = (picture - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
    found = wanted.pixels(pixels)[0]
    kind = {"bicubic": Image.BICUBIC, "bilinear": Image.BILINEAR}[image_filter]
    for channel in range(3):
        image = Image.fromarray(picture[0, channel].numpy()).resize((14, 14), kind)
        expected = (torch.from_numpy(np.array(image)) - OWN_MEAN[channel]) / OWN_STD[channel]
        torch.testing.assert_close(found[channel], expected, rtol=0, atol=2e-3)
    other = replace(wanted.target, image_filter="bilinear" if image_filter == "bicubic" else "bicubic")
    assert (frozen(other).pixels(pixels)[0] - found).abs().max() > 1e-2


@pytest.mark.parametrize("name", ["dinov2", "clip", "siglip", "vit", "vit_mae", "dinov3"])
def test_another_size_interpolates_positions_as_transformers_does(name, tmp_path):
    make, prefix = MODELS[name]
    model = saved(tmp_path, make()).double()
    images = torch.randn(1, 3, 42, 42)
    part = getattr(model, "vision_model", model)
    more = {"interpolate_pos_encoding": True} if name not in ("dinov2", "dinov3") else {}
    if name == "vit_mae":
        part.config.mask_ratio = 0.0
        more["noise"] = torch.arange(36.0).expand(1, 36)
    expected = part(pixel_values=picture_in_float64(images), **more).last_hidden_state[:, prefix:]
    found = frozen(target(tmp_path, image_size=42))(images, tile_tokens=36)
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-4 * float(expected.detach().abs().max()))


# --- what the configuration alone says ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_facts_of_the_configuration_are_those_of_the_model(name, tmp_path):
    make, prefix = MODELS[name]
    saved(tmp_path, make())
    for weights in tmp_path.glob("*.safetensors"):
        weights.unlink()
    facts = vision_facts(target(tmp_path))
    assert (facts.width, facts.side, facts.prefix, facts.image_size) == (24, 4, prefix, 28)
    model = make()
    part = getattr(model, "vision_model", model)
    assert facts.parameters == sum(parameter.numel() for parameter in part.parameters())


def test_floating_point_operations_are_those_of_the_matrices_by_hand(tmp_path):
    """DINOv2 with 16 patches and a class token: each multiplication and addition counts one."""
    saved(tmp_path, made("Dinov2"))
    tokens, width, inner = 17, 24, 96
    patches = 2 * 16 * 3 * 7 * 7 * width
    layer = 2 * tokens * (4 * width**2 + 2 * width * inner) + 4 * tokens**2 * width
    assert vision_facts(target(tmp_path)).flops == patches + 2 * layer
    model = load_model(target(tmp_path))
    model.set_attn_implementation("eager")
    with FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, 3, 28, 28))
    assert counter.get_total_flops() == patches + 2 * layer


# --- refused --------------------------------------------------------------------------------------------------------


def test_a_model_that_is_not_there_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ValueError, match="objective.viral.target_path=.*nowhere does not exist"):
        vision_facts(target(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match="objective.viral.target_path=DIR"):
        vision_facts(replace(target(tmp_path), path=None))


def test_a_model_without_its_processor_is_refused_rather_than_given_imagenets_statistics(tmp_path):
    saved(tmp_path, made("Dinov2"), statistics=False)
    with pytest.raises(ValueError, match="objective.viral.target_path=.* has no preprocessor_config.json"):
        frozen(target(tmp_path))
    with pytest.raises(ValueError, match="has no preprocessor_config.json"):
        check_files(target(tmp_path))
    (tmp_path / "preprocessor_config.json").write_text('{"image_mean": [0.5, 0.5, 0.5]}')
    with pytest.raises(ValueError, match="no image_mean and image_std of three colours"):
        check_files(target(tmp_path))


def test_a_processor_that_does_not_normalise_or_scales_otherwise_is_followed(tmp_path):
    saved(tmp_path, made("Dinov2"))
    processor = tmp_path / "preprocessor_config.json"
    processor.write_text(json.dumps({"do_normalize": False, "image_mean": OWN_MEAN, "image_std": OWN_STD}))
    assert read_statistics(target(tmp_path)).std == (1.0,) * 3
    processor.write_text(json.dumps({"rescale_factor": 1 / 127.5, "image_mean": [1, 1, 1], "image_std": [1, 1, 1]}))
    picture = torch.full((1, 3, 28, 28), 0.75)
    pixels = (picture - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
    torch.testing.assert_close(frozen(target(tmp_path)).pixels(pixels), torch.full((1, 3, 28, 28), 0.5))


def swin():
    shape = dict(image_size=32, patch_size=4, embed_dim=8, depths=[1, 1], num_heads=[1, 2], window_size=2)
    return transformers.SwinModel(transformers.SwinConfig(**shape))


def siglip2():
    """Its pictures come as rows of patches, with masks."""
    vision = dict(hidden_size=24, num_hidden_layers=1, num_attention_heads=2, **MLP)
    return transformers.Siglip2Model(transformers.Siglip2Config(text_config=TEXT, vision_config=vision))


@pytest.mark.parametrize(
    "make, sentence",
    [
        (lambda: transformers.LlamaModel(transformers.LlamaConfig(**TEXT)), "is a llama, which is no vision model"),
        (swin, r"is a swin that gives \[16, 16\] for a picture of 32 pixels: which of it are patches cannot be told"),
        (siglip2, "is a siglip2.*, which is no vision model"),
    ],
    ids=["llama", "swin", "siglip2"],
)
def test_what_is_no_vision_model_or_hides_its_patches_is_refused_by_name(make, sentence, tmp_path):
    saved(tmp_path, make())
    with pytest.raises(ValueError, match=sentence):
        check_files(target(tmp_path))


def test_a_size_that_is_no_multiple_of_the_patch_or_that_the_model_cannot_take_is_refused(tmp_path):
    saved(tmp_path / "dinov2", made("Dinov2"))
    with pytest.raises(
        ValueError, match="objective.viral.target_image_size=30 is no multiple .* 7 pixels: set 28 or 35"
    ):
        check_files(target(tmp_path / "dinov2", image_size=30))
    saved(tmp_path / "sam", sam())
    with pytest.raises(
        ValueError, match="does not take a picture of 80 x 80 .*: set another objective.viral.target_image_size"
    ):
        check_files(target(tmp_path / "sam", image_size=80))
    saved(tmp_path / "aimv2", MODELS["aimv2_vision"][0]())
    with pytest.raises(ValueError, match="does not take a picture of 42 x 42"):
        check_files(target(tmp_path / "aimv2", image_size=42))


def test_missing_weights_are_refused_and_not_drawn_at_random(tmp_path):
    from safetensors.torch import load_file, save_file

    saved(tmp_path, made("ViT", **MLP))
    weights = load_file(tmp_path / "model.safetensors")
    pooled = {name: tensor for name, tensor in weights.items() if not name.startswith("pooler")}
    save_file(pooled, tmp_path / "model.safetensors", {"format": "pt"})
    load_model(target(tmp_path))
    del pooled["encoder.layer.1.output.dense.weight"]
    save_file(pooled, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"no weights that fit encoder.layer.1.output.dense.weight \(1 in all"):
        load_model(target(tmp_path))
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="has none of model.safetensors"):
        check_files(target(tmp_path))


def test_visual_tokens_that_are_no_square_are_refused(tmp_path):
    saved(tmp_path, made("Dinov2"))
    with pytest.raises(ValueError, match="objective.viral.target_path needs a square grid"):
        frozen(target(tmp_path))(torch.zeros(1, 3, 28, 28), tile_tokens=6)
