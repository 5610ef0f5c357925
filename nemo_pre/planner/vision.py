"""Vision towers of every family: parameters, FLOPs, and what autograd keeps of them.

The towers are ``transformers``' own (with PyTorch's fused attention), on the first stage, whole on each of its ranks.
With native resolution every image is taken to have the most visual tokens it may have.
"""

from __future__ import annotations

from nemo_pre.config.schema import VisionConfig
from nemo_pre.config.vision_families import class_tokens, encoder_tokens, is_native, merge_size

FLOAT, INDEX = 4, 8  # bytes
AIMV2_FAMILIES = ("aimv2", "aimv2_native")


def num_patches(vision: VisionConfig) -> int:
    return encoder_tokens(vision) - class_tokens(vision)


def pixels_of_tile(vision: VisionConfig) -> int:
    """Numbers of a tile's pixels as the tower takes them; two frames of Qwen2.5-VL's."""
    frames = 2 if vision.family == "qwen25_vl" else 1
    return num_patches(vision) * frames * 3 * vision.patch_size**2


def unused_layers(vision: VisionConfig) -> int:
    """Number of layers behind the one whose features are taken: they are frozen, and run in a tower of fixed
    resolution."""
    if vision.family == "qwen25_vl":
        return 0
    last_used = vision.feature_layer if vision.feature_layer >= 0 else vision.num_layers + 1 + vision.feature_layer
    return vision.num_layers - last_used


# --- parameters -----------------------------------------------------------------------------------------------------


def tower_parameters(vision: VisionConfig) -> int:
    width, pixels = vision.hidden_size, 3 * vision.patch_size**2
    if vision.family == "qwen25_vl":  # two frames, no biases, no positions; the norm before the projector
        return 2 * pixels * width + vision.num_layers * layer_parameters(vision) + width
    if vision.family == "patch_mlp":
        return vision.intermediate_size * (pixels + 1) + width * (vision.intermediate_size + 1)
    positions = 0 if vision.family == "aimv2_native" else encoder_tokens(vision)
    embeddings = (pixels + positions + class_tokens(vision)) * width
    # A norm; a bias and a norm's weight; a bias.
    embeddings += (2 if vision.family in ("clip", *AIMV2_FAMILIES) else 1) * width
    return embeddings + vision.num_layers * layer_parameters(vision) + _beside_layers(vision)


def layer_parameters(vision: VisionConfig) -> int:
    width, inner = vision.hidden_size, vision.intermediate_size
    if vision.family in AIMV2_FAMILIES:  # gated MLP, no biases
        return 4 * width**2 + 3 * width * inner + 2 * width
    if vision.family == "qwen25_vl":  # gated MLP
        return 4 * width * (width + 1) + 2 * inner * (width + 1) + width * (inner + 1) + 2 * width
    scales = 2 * width if vision.family == "dinov2" else 0
    return 4 * width * (width + 1) + inner * (width + 1) + width * (inner + 1) + 4 * width + scales


def unused_parameters(vision: VisionConfig) -> int:
    """Number of parameters that the features do not depend on: they are frozen."""
    return unused_layers(vision) * layer_parameters(vision) + _beside_layers(vision)


def _beside_layers(vision: VisionConfig) -> int:
    """Number of parameters beside the layers: the last norm; SigLIP's pooling (a probe that attends to all patches, a
    norm, an MLP); DINOv2's mask token."""
    width = vision.hidden_size
    pooling = 0
    if vision.pooling_head:
        pooling = layer_parameters(vision) - width  # a layer has a norm more, the pooling a probe more
    norm_and_others = {"clip": 2 * width, "siglip": 2 * width + pooling, "dinov2": 3 * width}
    return width if vision.family in AIMV2_FAMILIES else norm_and_others.get(vision.family, 0)


# --- FLOPs ----------------------------------------------------------------------------------------------------------


def tower_flops(vision: VisionConfig, tiles: int) -> tuple[float, float]:
    """FLOPs of a forward pass over ``tiles`` tiles, and of the backward pass if the tower is trained."""
    if vision.family == "qwen25_vl":
        return _qwen_vl_flops(vision, tiles)
    width, inner, tokens = vision.hidden_size, vision.intermediate_size, encoder_tokens(vision)
    first_width = inner if vision.family == "patch_mlp" else width
    patches = 2.0 * tiles * num_patches(vision) * 3 * vision.patch_size**2 * first_width
    if vision.family == "patch_mlp":
        output = 2.0 * tiles * tokens * inner * width
        return patches + output, patches + 2 * output  # pixels need no gradient
    matrices = 4 * width**2 + (3 if vision.family in AIMV2_FAMILIES else 2) * width * inner
    layer = tiles * (2.0 * tokens * matrices + 4.0 * tokens**2 * width)
    used = vision.num_layers - unused_layers(vision)
    run = used if is_native(vision) else vision.num_layers
    pooling = tiles * _pooling_flops(vision) if vision.family == "siglip" and vision.pooling_head else 0.0
    return patches + run * layer + pooling, patches + 2 * used * layer


def _qwen_vl_flops(vision: VisionConfig, images: int) -> tuple[float, float]:
    width, tokens = vision.hidden_size, encoder_tokens(vision)
    patches = 2.0 * images * tokens * 2 * 3 * vision.patch_size**2 * width
    products = vision.num_layers * 2.0 * tokens * (4 * width**2 + 3 * width * vision.intermediate_size)
    assert vision.window_size is not None and vision.full_attention_layers is not None
    whole = len(vision.full_attention_layers)
    window = min((vision.window_size // vision.patch_size) ** 2, tokens)
    attention = 4.0 * tokens * width * (whole * tokens + (vision.num_layers - whole) * window)
    layers = images * (products + attention)
    return patches + layers, patches + 2 * layers


def _pooling_flops(vision: VisionConfig) -> float:
    width, tokens = vision.hidden_size, encoder_tokens(vision)
    projections = 2.0 * width**2 * (2 * tokens + 2)
    return projections + 4.0 * tokens * width + 4.0 * width * vision.intermediate_size


# --- activations ----------------------------------------------------------------------------------------------------


def tower_activations(vision: VisionConfig, tiles: int, size: int, on_gpu: bool = False) -> int:
    """Bytes of a trained tower up to the features' layer: what the layers behind it save is freed at once.

    Args:
        size: bytes of an element.
        on_gpu: norms keep their statistics in float32 there, and on a CPU in the elements' type.
    """
    statistics = FLOAT if on_gpu else size
    inner, tokens = vision.intermediate_size, tiles * encoder_tokens(vision)
    if vision.family == "qwen25_vl":
        pixels = tiles * pixels_of_tile(vision) * size
        whole = sorted(vision.full_attention_layers or [])
        orders = bool(whole) + (len(whole) < vision.num_layers)  # windows' and images', each with its angles
        angles = orders * 2 * vision.hidden_size // vision.num_attention_heads * FLOAT
        # Of visual tokens: into windows, back at the end, from one order to the other and back.
        back_to_windows = bool(whole) and any(number not in whole for number in range(whole[0], vision.num_layers))
        indices = (2 + bool(whole) + back_to_windows) * INDEX // merge_size(vision) ** 2
        before_and_behind = angles + _norm(vision, size, statistics) + indices
        return tokens * (vision.num_layers * _qwen_vl_layer_bytes(vision, size) + before_and_behind) + pixels
    pixels = tiles * pixels_of_tile(vision) * size
    if vision.family == "patch_mlp":
        return 2 * tokens * inner * size + pixels  # the GELU's input and output
    used = vision.num_layers - unused_layers(vision)
    before_layers = tokens * _norm(vision, size, statistics) if vision.family in ("clip", *AIMV2_FAMILIES) else 0
    return used * tokens * _layer_bytes(vision, size, statistics) + before_layers + pixels


def _layer_bytes(vision: VisionConfig, size: int, statistics: int) -> int:
    """Bytes that a token keeps in a layer: norms, inputs of linear layers, activation function, attention."""
    width, inner = vision.hidden_size, vision.intermediate_size
    copies = 5 if vision.family == "aimv2" else 2  # its patches lie transposed: each linear layer makes a copy
    inputs = (copies * width + inner) * size
    # CLIP keeps x and sigmoid(1.702 x), a gated MLP both factors and the activated one.
    activation = (3 if vision.family in AIMV2_FAMILIES else 2 if vision.family == "clip" else 1) * inner * size
    attention = 4 * width * size + vision.num_attention_heads * FLOAT
    scaled = 2 * width * size if vision.family == "dinov2" else 0
    return 2 * _norm(vision, size, statistics) + inputs + activation + attention + scaled


def _qwen_vl_layer_bytes(vision: VisionConfig, size: int) -> int:
    """Bytes that a token keeps in a layer of Qwen2.5-VL's tower: queries and keys are rotated in float32, and the
    windows' outputs put together again."""
    width, inner = vision.hidden_size, vision.intermediate_size
    attention = 7 * width * size + vision.num_attention_heads * FLOAT
    return 2 * _norm(vision, size, FLOAT) + (2 * width + 4 * inner) * size + attention


def _norm(vision: VisionConfig, size: int, statistics: int) -> int:
    """Bytes that a token keeps in a norm: the input and its statistics; an RMSNorm has a float32 copy, and the
    normalised input."""
    width, of_root_mean_square = vision.hidden_size, vision.family in (*AIMV2_FAMILIES, "qwen25_vl")
    return width * (FLOAT + size) + FLOAT if of_root_mean_square else width * size + 2 * statistics
