"""Vision towers on tiny random models made with transformers' own classes."""

from dataclasses import replace

import pytest
import torch

from nemo_pre.config.schema import ModelConfig, VisionConfig
from nemo_pre.config.vision_families import transformers_values
from nemo_pre.neva.build import build_projector_config
from nemo_pre.neva.native_qwen_vl import patch_places
from nemo_pre.neva.vision import VisionTowerConfig, freeze_unused_layers
from nemo_pre.objectives.pre.head import PredictionHeadSpec
from tests.waits import DEVICE, no_waits

SHAPE = dict(image_size=28, patch_size=7, hidden_size=32, intermediate_size=64, num_layers=3, num_attention_heads=2)
CLASS_TOKENS = {"clip": 1, "siglip": 0, "dinov2": 1, "aimv2": 0, "patch_mlp": 0}


def tower(family="clip"):
    return VisionTowerConfig(VisionConfig(family=family, **SHAPE), seed=7)


@pytest.mark.parametrize("family, class_tokens", CLASS_TOKENS.items())
def test_a_tower_gives_the_tokens_its_config_promises(family, class_tokens):
    config = tower(family)
    hidden_states = config.configure_model()(torch.zeros(2, 3, 28, 28), output_hidden_states=True).hidden_states
    assert hidden_states[-1].shape == (2, 16 + class_tokens, 32)
    assert len(hidden_states) == (1 if family == "patch_mlp" else 4)
    assert config.num_image_embeddings_per_tile == 16 + class_tokens
    assert config.class_token_len == class_tokens


def test_random_weights_do_not_depend_on_what_was_drawn_before():
    first = tower().configure_model().state_dict()
    torch.rand(5)
    state = torch.get_rng_state()
    second = tower().configure_model().state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert torch.equal(torch.get_rng_state(), state), "building a tower advanced the rank's generator"


@pytest.mark.parametrize("feature_layer", [-2, -1])
@pytest.mark.parametrize("family", CLASS_TOKENS)
def test_what_the_features_do_not_depend_on_is_frozen_and_nothing_else(family, feature_layer):
    model = tower(family).configure_model()
    feature_layer = -1 if family == "patch_mlp" else feature_layer
    freeze_unused_layers(model, feature_layer)
    features = model(torch.randn(1, 3, 28, 28), output_hidden_states=True).hidden_states[feature_layer]
    features.square().sum().backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name


def test_a_patch_mlp_gives_each_patch_by_itself_row_by_row():
    model = tower("patch_mlp").configure_model()
    image = torch.randn(1, 3, 28, 28)
    changed = image.clone()
    changed[..., 7:14, 14:21] += 1.0  # the patch in row 1 and column 2 of 4 x 4
    before, after = (model(pixels).hidden_states[-1][0] for pixels in (image, changed))
    assert (before != after).any(dim=-1).nonzero().flatten().tolist() == [6]
    first = image[0, :, :7, :7].flatten()
    hidden = torch.nn.functional.gelu(model.patch_embedding.weight.flatten(1) @ first + model.patch_embedding.bias)
    torch.testing.assert_close(before[0], model.output(hidden), atol=1e-5, rtol=1e-5)


def test_heads_of_different_layers_start_differently_and_reproducibly():
    spec = PredictionHeadSpec((2, 3), 8, 4, 6, "gelu", norm=True, seed=0)
    assert torch.equal(spec.build(2).fc1.weight, spec.build(2).fc1.weight)
    assert not torch.equal(spec.build(2).fc1.weight, spec.build(3).fc1.weight)
    assert spec.build(2)(torch.zeros(0, 8)).shape == (0, 6)


# --- native resolution ----------------------------------------------------------------------------------------------

NATIVE = VisionConfig(
    family="qwen25_vl", image_size=0, patch_size=4, hidden_size=32, intermediate_size=48, num_layers=3,
    num_attention_heads=2, feature_layer=-1, drop_class_token=False, min_visual_tokens=1, max_visual_tokens=64,
    window_size=16, full_attention_layers=[1],
)  # fmt: skip
GRIDS = [(2, 3), (5, 1), (1, 1), (4, 6)]


def transformers_tower(width: int = 24):
    """The whole of it, with the merger's MLP to ``width``."""
    from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLVisionConfig
    from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VisionTransformerPretrainedModel

    torch.manual_seed(3)
    values = {**transformers_values(NATIVE), "out_hidden_size": width}
    return Qwen2_5_VisionTransformerPretrainedModel(Qwen2_5_VLVisionConfig(**values)).eval()


def projector(width: int = 24):
    model = ModelConfig(name="tiny", vision=NATIVE)
    model.language.hidden_size = width
    return build_projector_config(model, seed=0, on_gpu=False).configure_model()


def test_tower_and_projector_are_transformers_tower_and_its_merger():
    """On images of several sizes: every weight has a place, and the features are equal."""
    theirs, tower, mlp = transformers_tower(), VisionTowerConfig(NATIVE, 7).configure_model().eval(), projector()
    state = theirs.state_dict()
    merger = {name.removeprefix("merger.mlp."): state.pop(name) for name in list(state) if "merger.mlp" in name}
    tower.load_state_dict(state)
    mlp.load_state_dict(merger)
    patches = torch.randn(sum(rows * columns for rows, columns in GRIDS), 4, 3 * 4**2)
    frames = patches.view(-1, 3, 1, 16).expand(-1, 3, 2, 16).reshape(-1, 96)
    sizes = torch.tensor([[1, 2 * rows, 2 * columns] for rows, columns in GRIDS])
    features = tower(patches, GRIDS)
    assert features.shape == (36, 4 * 32)
    torch.testing.assert_close(mlp(features), theirs(frames, sizes), atol=1e-6, rtol=1e-5)
    first = tower(patches[:6], GRIDS[:1])
    torch.testing.assert_close(features[:6], first, atol=1e-6, rtol=1e-5, msg="images see each other")


def test_the_towers_windows_attend_as_transformers_do_values_and_gradients():
    """In float64, of pictures of many sizes, some less than a window; whole pictures in any layers or in none."""
    from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VisionTransformerPretrainedModel as Theirs

    grids = [(7, 5), (2, 2), (1, 9), (5, 7), (4, 4), (2, 2), (3, 1)]
    for full_layers in ([1], [0, 3], [2, 3], []):
        vision = replace(NATIVE, num_layers=4, full_attention_layers=full_layers)
        tower = VisionTowerConfig(vision, 7).configure_model().double().eval()
        theirs = Theirs(tower.config).double().eval()
        theirs.merger.mlp = torch.nn.Identity()
        theirs.load_state_dict(tower.state_dict())
        theirs.rotary_pos_emb.float()  # angles are float32 whatever the weights are
        patches = torch.randn(sum(rows * columns for rows, columns in grids), 4, 3 * 4**2, dtype=torch.float64)
        frames = patches.view(-1, 3, 1, 16).expand(-1, 3, 2, 16).reshape(-1, 96)
        features = tower(patches, grids)
        expected = theirs(frames, torch.tensor([[1, 2 * rows, 2 * columns] for rows, columns in grids]))
        torch.testing.assert_close(features, expected, atol=1e-12, rtol=1e-10)
        weight = torch.randn_like(features)
        for each in (features, expected):
            (each * weight).sum().backward()
        for (name, ours), other in zip(tower.named_parameters(), theirs.parameters(), strict=True):
            torch.testing.assert_close(ours.grad, other.grad, atol=1e-10, rtol=1e-9, msg=name)


def test_a_layer_attends_once_for_every_size_of_window_and_the_host_never_waits(monkeypatch):
    """Two pictures of 1120 x 896 pixels as the published tower sees them, forward and backward, without a value."""
    calls, attend = [], torch.nn.functional.scaled_dot_product_attention

    def count(query, key, value, **options):
        calls.append(tuple(query.shape))
        return attend(query, key, value, **options)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", count)
    vision = replace(NATIVE, patch_size=14, window_size=112, full_attention_layers=[2])
    tower = VisionTowerConfig(vision, 7).configure_model().to(DEVICE)
    for grids, sizes in (([(40, 32)] * 2, 1), ([(40, 32), (41, 30)], 4)):
        calls.clear()
        tokens = sum(rows * columns for rows, columns in grids)
        with no_waits():
            tower(torch.zeros(tokens, 4, 3 * 14**2, device=DEVICE), grids).sum().backward()
        assert len(calls) == 2 * sizes + len(set(grids)), "two layers of windows, one of whole pictures"
        assert sum(windows * patches for windows, _, patches, _ in calls) == 3 * 4 * tokens


AIMV2 = VisionConfig(
    family="aimv2_native", image_size=0, patch_size=4, hidden_size=32, intermediate_size=48, num_layers=3,
    num_attention_heads=2, feature_layer=-2, drop_class_token=False, min_visual_tokens=1, max_visual_tokens=64,
)  # fmt: skip


@pytest.mark.parametrize("feature_layer", [-1, -2, 0, 1])
def test_aimv2_gives_every_image_the_features_that_transformers_gives_it_alone(feature_layer):
    from transformers import Aimv2VisionConfig, Aimv2VisionModel

    tower = VisionTowerConfig(replace(AIMV2, feature_layer=feature_layer), 7).configure_model()
    theirs = Aimv2VisionModel(Aimv2VisionConfig(**transformers_values(AIMV2))).eval()
    theirs.load_state_dict(tower.state_dict())
    patches = torch.randn(sum(rows * columns for rows, columns in GRIDS), 1, 3 * 4**2)
    features, first = tower(patches, GRIDS), 0
    for rows, columns in GRIDS:
        own = slice(first, first := first + rows * columns)
        image = patches[own].view(rows, columns, 3, 4, 4).permute(2, 0, 3, 1, 4).reshape(1, 3, 4 * rows, 4 * columns)
        expected = theirs(image, output_hidden_states=True).hidden_states[feature_layer][0]
        torch.testing.assert_close(features[own], expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("feature_layer", [-1, -2])
def test_what_aimv2s_features_do_not_depend_on_is_frozen_and_nothing_else(feature_layer):
    tower = VisionTowerConfig(replace(AIMV2, feature_layer=feature_layer), 7).configure_model()
    freeze_unused_layers(tower, feature_layer)
    tower(torch.randn(6, 1, 48), GRIDS[:1]).square().sum().backward()
    for name, parameter in tower.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name


def test_aimv2s_positions_are_its_own_whatever_the_weights_are():
    """Their rounding to bf16 is all that a bf16 tower adds: transformers' angles are bf16 themselves."""
    from transformers.models.aimv2.modeling_aimv2 import Aimv2VisionEmbeddings

    build = Aimv2VisionEmbeddings.build_2d_sincos_position_embedding
    exact = build(40, 71, embed_dim=32, dtype=torch.float64)[0]
    tower = VisionTowerConfig(replace(AIMV2, feature_layer=0), 7).configure_model()
    torch.nn.init.zeros_(tower.embeddings.rms_norm.weight)  # leaves the positions
    nothing = torch.zeros(40 * 71, 1, 48)
    torch.testing.assert_close(tower(nothing, [(40, 71)]).double(), exact, rtol=0, atol=1e-5)
    found = tower.bfloat16()(nothing.bfloat16(), [(40, 71)])
    torch.testing.assert_close(found.double(), exact, rtol=0, atol=2**-8)
    assert (build(40, 71, embed_dim=32, dtype=torch.bfloat16)[0].double() - exact).abs().max() > 0.05


def test_every_parameter_of_a_native_tower_is_trained_and_its_config_promises_its_limit():
    config = VisionTowerConfig(NATIVE, 7)
    tower = config.configure_model()
    freeze_unused_layers(tower, -1)
    tower(torch.randn(6, 4, 48), GRIDS[:1]).square().sum().backward()
    assert all(parameter.grad is not None for parameter in tower.parameters())
    assert config.num_image_embeddings_per_tile == 64 and config.class_token_len == 0


def test_aimv2_is_the_same_after_the_meta_device():
    tower = VisionTowerConfig(AIMV2, 7).configure_model()
    with torch.device("meta"):
        built = VisionTowerConfig(AIMV2, 7).configure_model()
    built.to_empty(device="cpu").load_state_dict(tower.state_dict())
    patches = torch.randn(24, 1, 48)
    assert torch.equal(built(patches, GRIDS[3:]), tower(patches, GRIDS[3:]))


def test_a_native_towers_positions_stay_exact_in_bf16_and_are_there_after_the_meta_device():
    patches = torch.randn(24, 4, 48)
    tower = VisionTowerConfig(NATIVE, 7).configure_model()
    with torch.device("meta"):
        built = VisionTowerConfig(NATIVE, 7).configure_model()
    built.to_empty(device="cpu").load_state_dict(tower.state_dict())
    assert torch.equal(built(patches, GRIDS[3:]), tower(patches, GRIDS[3:]))
    places = patch_places(GRIDS[3:], merge=2).flatten(0, 1)
    assert places[[0, 1, 2, -1]].tolist() == [[0, 0], [0, 1], [1, 0], [7, 11]]
    angles = tower.rotary_pos_emb(places)
    assert torch.equal(tower.bfloat16().rotary_pos_emb(places), angles)
    assert angles.dtype == torch.float32
