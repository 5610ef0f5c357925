"""NeVA + PRe + VIRAL in plain torch: the oracle the parity tests compare every layout with.

Slow and obvious on purpose. One sample at a time, one file, no Megatron, no NeMo, no batching, no padding: what is
shared with the implementation under test is only the naming of the weights (Megatron's, unsharded) and the batch
format. The loss is the one of arXiv 2603.20808 over the *global* batch, that is over all micro-batches and all
data-parallel ranks together:

    L     = L_LM + weight * L_PRe + viral.weight * L_VIRAL      (the latter in :mod:`tests.reference.viral`)
    L_LM  = sum_t loss_mask_t * CE_t / sum_t loss_mask_t
    L_PRe = mean over target layers l of  -(1/N_vis) sum_i cos(f_l(h^l_i), stopgrad(h^0_i))

``i`` runs over the visual tokens that entered the language model (those cut off by the maximum length did not),
h^0 is the output of the projector, h^l the output of decoder layer ``l`` (1-based) before the final norm. The paper
has one target layer; that several layers are averaged, not summed, is this project's definition.

Legend of shape suffixes: s sequence, d decoder width, n visual tokens, v vision width.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.reference.viral import ViralReference, viral_sums

IMAGE_TOKEN = -200
NO_LABEL = -100
LM = "language_model."


@dataclass(frozen=True)
class ReferenceConfig:
    num_layers: int
    num_attention_heads: int
    num_query_groups: int
    max_sequence_length: int
    vision: Any  # a transformers CLIPVisionConfig or SiglipVisionConfig
    head_dim: int | None = None  # null: hidden size / heads
    rotary_base: float = 10000.0
    layernorm_epsilon: float = 1e-5
    tie_embeddings: bool = False
    feature_layer: int = -2
    drop_class_token: bool = True
    pre_layers: tuple[int, ...] = ()  # 1-based; empty: no PRe
    pre_weight: float = 0.5
    pre_variant: str = "patch"  # patch | global
    pre_anchor: str = "pre_llm"  # pre_llm | pre_projector | average (of the projector, "ema_projection." in the state)
    head_activation: str = "gelu"
    viral: ViralReference = ViralReference()
    literal_algorithm_1: bool = False  # the supplement's typo: the anchor is the target layer itself


def expand_sample(
    tokens: list[int],
    labels: list[int],
    loss_mask: list[float],
    tokens_per_image: int | Sequence[int],
    max_length: int,
) -> tuple[list[tuple[str, int]], list[int], list[float]]:
    """One sample's text with every image token replaced by its visual tokens, as many for each or as many as the
    sequence says.

    ``labels[t]`` is the target of position ``t``. Returns, per position of the language model's sequence: where
    its embedding comes from (``("text", token)`` or ``("image", index into the sample's visual tokens)``), its
    label and its loss mask, all cut at ``max_length``.

    The text token just before an image predicts nothing (its target would be a visual token); the last visual
    token carries the label of the text that follows but is masked, as NeVA has it.
    """
    source: list[tuple[str, int]] = []
    out_labels: list[int] = []
    out_mask: list[float] = []
    visual_tokens = images = 0
    for t, token in enumerate(tokens):
        before_image = t + 1 < len(tokens) and tokens[t + 1] == IMAGE_TOKEN
        label = NO_LABEL if before_image else labels[t]
        if token == IMAGE_TOKEN:
            size = tokens_per_image if isinstance(tokens_per_image, int) else tokens_per_image[images]
            images += 1
            for _ in range(size):
                source.append(("image", visual_tokens))
                visual_tokens += 1
            out_labels += [NO_LABEL] * (size - 1) + [label]
            out_mask += [0.0] * size
        else:
            source.append(("text", token))
            out_labels.append(label)
            out_mask.append(0.0 if before_image else loss_mask[t])
    return source[:max_length], out_labels[:max_length], out_mask[:max_length]


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + epsilon) * weight


def rotate(x: Tensor, base: float) -> Tensor:
    """Rotary embedding of ``[s, heads, head_dim]`` at positions 0..s-1, the two halves of a head paired."""
    half = x.shape[-1] // 2
    inverse_frequency = base ** (-torch.arange(half, dtype=x.dtype) / half)
    angle = torch.arange(x.shape[0], dtype=x.dtype)[:, None] * inverse_frequency
    cos, sin = angle.cos()[:, None], angle.sin()[:, None]
    first, second = x[..., :half], x[..., half:]
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def attention(x_sd: Tensor, w: dict[str, Tensor], config: ReferenceConfig) -> Tensor:
    """Causal grouped-query attention; rows of ``linear_qkv`` are, per query group, its queries, its key, its value."""
    length, width = x_sd.shape
    groups, heads = config.num_query_groups, config.num_attention_heads
    head_dim = config.head_dim or width // heads
    queries_per_group = heads // groups
    qkv = F.linear(x_sd, w["self_attention.linear_qkv.weight"], w.get("self_attention.linear_qkv.bias"))
    qkv = qkv.view(length, groups, queries_per_group + 2, head_dim)
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    context = []
    for group in range(groups):
        key = rotate(qkv[:, group, queries_per_group][:, None], config.rotary_base)[:, 0]
        value = qkv[:, group, queries_per_group + 1]
        for head in range(queries_per_group):
            query = rotate(qkv[:, group, head][:, None], config.rotary_base)[:, 0]
            score = (query @ key.T / math.sqrt(head_dim)).masked_fill(~causal, float("-inf"))
            context.append(score.softmax(-1) @ value)
    return F.linear(torch.cat(context, dim=-1), w["self_attention.linear_proj.weight"])


def swiglu(x_sd: Tensor, w: dict[str, Tensor]) -> Tensor:
    gate, up = F.linear(x_sd, w["mlp.linear_fc1.weight"]).chunk(2, dim=-1)  # rows: all of gate, then all of up
    return F.linear(F.silu(gate) * up, w["mlp.linear_fc2.weight"])


def decode(x_sd: Tensor, state: dict[str, Tensor], config: ReferenceConfig) -> tuple[Tensor, list[Tensor]]:
    """Logits ``[s, padded vocabulary]`` and the hidden states: entry ``l`` is the output of layer ``l``, 0 the input.

    The vocabulary's padding rows take part in the softmax, as they do in Megatron.
    """
    hidden = [x_sd]
    for layer in range(config.num_layers):
        w = _below(state, f"{LM}decoder.layers.{layer}.")
        x_sd = x_sd + attention(rms_norm(x_sd, w["input_layernorm.weight"], config.layernorm_epsilon), w, config)
        x_sd = x_sd + swiglu(rms_norm(x_sd, w["pre_mlp_layernorm.weight"], config.layernorm_epsilon), w)
        hidden.append(x_sd)
    final = rms_norm(x_sd, state[f"{LM}decoder.final_layernorm.weight"], config.layernorm_epsilon)
    output = "embedding.word_embeddings.weight" if config.tie_embeddings else "output_layer.weight"
    return F.linear(final, state[LM + output]), hidden


def vision_tower(config: ReferenceConfig) -> torch.nn.Module:
    """The ``transformers`` tower in the given shape, on the meta device: weights come from the state dict."""
    from transformers import Aimv2VisionModel, CLIPVisionModel, SiglipVisionModel
    from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VisionTransformerPretrainedModel

    if config.vision.model_type == "qwen2_5_vl":
        tower = Qwen2_5_VisionTransformerPretrainedModel(config.vision).eval()
        tower.merger.mlp = torch.nn.Identity()  # it is the projector
        return tower
    family = {
        "clip_vision_model": CLIPVisionModel,
        "siglip_vision_model": SiglipVisionModel,
        "aimv2_vision_model": Aimv2VisionModel,
    }
    tower: torch.nn.Module = family[config.vision.model_type](config.vision)
    if config.vision.model_type in ("clip_vision_model", "siglip_vision_model") and not hasattr(tower, "vision_model"):
        tower = _Named(tower)
    return tower.eval()


class _Named(torch.nn.Module):
    """A tower of transformers 5 under the names that transformers 4 has for its weights, which are a checkpoint's."""

    def __init__(self, tower: torch.nn.Module) -> None:
        super().__init__()
        self.vision_model = tower

    def forward(self, pixels: Tensor, **options: Any) -> Any:
        return self.vision_model(pixels, **options)


def encode_image(image: Any, tower: torch.nn.Module, state: dict[str, Tensor], config: ReferenceConfig) -> Tensor:
    """Vision features ``[n, v]`` of one image ``[3, H, W]``, of its tiles ``[tiles, 3, H, W]`` in turn, or of
    ``(patches, (rows, columns))`` where images keep their aspect ratio."""
    if not isinstance(image, tuple) and image.ndim == 4:
        return torch.cat([encode_image(tile, tower, state, config) for tile in image])
    weights = _below(state, "vision_model.")
    dtype = next(iter(weights.values())).dtype
    if isinstance(image, tuple) and config.vision.model_type == "aimv2_vision_model":
        patches, (rows, columns) = image
        side = config.vision.patch_size
        places = patches.reshape(rows, columns, 3, side, side).permute(2, 0, 3, 1, 4)
        image = places.reshape(3, rows * side, columns * side)
    if isinstance(image, tuple):
        patches, (rows, columns) = image
        channels = patches.to(dtype).reshape(4 * rows * columns, 3, 1, -1)
        frames = torch.cat([channels, channels], dim=2).flatten(1)
        return torch.func.functional_call(tower, weights, (frames, torch.tensor([[1, 2 * rows, 2 * columns]])))
    output = torch.func.functional_call(
        tower, weights, args=(image[None].to(dtype),), kwargs={"output_hidden_states": True}
    )
    features_nv = output.hidden_states[config.feature_layer][0]
    return features_nv[1:] if config.drop_class_token else features_nv


def project(features_nv: Tensor, state: dict[str, Tensor], projector: str = "vision_projection.") -> Tensor:
    """The mlp2x_gelu projector: ``[n, v]`` to ``[n, d]``."""
    w = _below(state, projector)
    return F.linear(F.gelu(F.linear(features_nv, w["0.weight"], w["0.bias"])), w["2.weight"], w["2.bias"])


def prediction_head(x_nd: Tensor, layer: int, state: dict[str, Tensor], config: ReferenceConfig) -> Tensor:
    """f_l: [LayerNorm ->] Linear -> activation -> Linear."""
    w = _below(state, f"pre_heads.{layer}.")
    if "norm.weight" in w:
        x_nd = F.layer_norm(x_nd, x_nd.shape[-1:], w["norm.weight"], w["norm.bias"])
    activation = {"gelu": F.gelu, "relu": F.relu, "silu": F.silu}[config.head_activation]
    return F.linear(activation(F.linear(x_nd, w["fc1.weight"], w["fc1.bias"])), w["fc2.weight"], w["fc2.bias"])


def cosine(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum() / (a.norm() * b.norm())


def sample_sums(
    sample: dict[str, Any], tower: torch.nn.Module, state: dict[str, Tensor], config: ReferenceConfig
) -> dict[str, Any]:
    """One sample's sums: ``lm`` and ``tokens``, ``cosine`` per target layer and ``visual`` (tokens, or images), and
    VIRAL's ``viral`` per target layer and ``viral_count``."""
    features = [encode_image(image, tower, state, config) for image in sample["images"]]
    visual = [project(f, state) for f in features]
    per_image = [len(tokens) for tokens in visual]
    image_of = [image for image, size in enumerate(per_image) for _ in range(size)]
    visual_nd, features_nv = (torch.cat(x) if x else torch.empty(0) for x in (visual, features))
    anchors = features_nv if config.pre_anchor == "pre_projector" else visual_nd
    if config.pre_anchor == "average" and features:
        anchors = project(features_nv, state, "ema_projection.")
    source, labels, mask = expand_sample(
        sample["tokens"], sample["labels"], sample["loss_mask"], per_image, config.max_sequence_length
    )

    embedding = state[f"{LM}embedding.word_embeddings.weight"]
    rows = [visual_nd[index] if kind == "image" else embedding[index] for kind, index in source]
    logits, hidden = decode(torch.stack(rows), state, config)

    zero = embedding.new_zeros(())
    lm, count = zero, 0.0
    for position, (label, weight) in enumerate(zip(labels, mask, strict=True)):
        if weight:
            assert label != NO_LABEL, f"position {position} counts in the loss but has no label"
            lm = lm - weight * logits[position].log_softmax(-1)[label]
            count += weight

    by_image: dict[int, list[tuple[int, int]]] = {}  # image -> its (position in the sequence, visual token)
    for position, (kind, index) in enumerate(source):
        if kind == "image":
            by_image.setdefault(image_of[index], []).append((position, index))
    cosines = dict.fromkeys(config.pre_layers, zero)
    n_visual = 0
    for pairs in by_image.values():
        groups = [pairs] if config.pre_variant == "global" else [[pair] for pair in pairs]
        n_visual += len(groups)
        for layer in config.pre_layers:
            for group in groups:
                positions, indices = [p for p, _ in group], [i for _, i in group]
                context = hidden[layer][positions].mean(0)  # the mean of one token is that token
                anchor = anchors[indices].mean(0)
                if config.literal_algorithm_1:
                    anchor = context
                prediction = prediction_head(context, layer, state, config)
                cosines[layer] = cosines[layer] + cosine(prediction, anchor.detach())
    targets_nt = features_nv if config.viral.target == "encoder" else sample["target"]
    viral, viral_count = viral_sums(list(by_image.values()), hidden, targets_nt, state, config.viral)
    return {
        "lm": lm,
        "tokens": count,
        "cosine": cosines,
        "visual": n_visual,
        "viral": viral,
        "viral_count": viral_count,
    }


def split_samples(micro_batches: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The samples of all micro-batches, each with its own images (a micro-batch lists its images in order) and the
    features ``target`` of their visual tokens, where the batch has any; of packed rows every sample by itself."""
    samples = []
    for batch in micro_batches:
        media, tiles = batch["media"], batch["num_media_tiles"]
        images = [] if media is None else list(media)
        if max(tiles, default=1) > 1:
            images = list(media.split(tiles))
        features = batch.get("targets", {}).get("viral")
        targets = [] if features is None else [tile.flatten(0, 1) for tile in features.split(tiles)]
        if media is not None and "media_grids" in batch:
            sizes = [rows * columns for rows, columns in batch["media_grids"]]
            images = list(zip(media.split(sizes), batch["media_grids"], strict=True))
        segments = batch.get("segments", torch.zeros_like(batch["tokens"]))
        for tokens, labels, mask, segment in zip(
            batch["tokens"], batch["labels"], batch["loss_mask"], segments, strict=True
        ):
            for number in range(int(segment.max()) + 1):
                mine = segment == number
                own = [images.pop(0) for token in tokens[mine].tolist() if token == IMAGE_TOKEN]
                own_targets = [targets.pop(0) for _ in own] if targets else []
                samples.append(
                    {
                        "tokens": tokens[mine].tolist(),
                        "labels": labels[mine].tolist(),
                        "loss_mask": mask[mine].tolist(),
                        "images": own,
                        "target": torch.cat(own_targets) if own_targets else torch.empty(0),
                    }
                )
        assert not images, f"{len(images)} images of the micro-batch belong to no sample"
    return samples


def reference_step(
    state_dict: dict[str, Tensor],
    config: ReferenceConfig,
    micro_batches: list[dict[str, Any]],
    dtype: torch.dtype = torch.float64,
) -> dict[str, Any]:
    """Losses and gradients of one step over the global batch, computed in ``dtype``.

    ``micro_batches`` are those of all data-parallel ranks together. Returns ``loss_lm``, ``loss_pre`` (unweighted,
    averaged over the target layers), ``loss_pre_by_layer``, ``tokens``, ``visual``, ``loss_viral``,
    ``loss_viral_by_layer``, ``viral_count`` and ``grads``: for every entry of ``state_dict`` the gradient of
    ``loss_lm + pre_weight * loss_pre + viral.weight * loss_viral``, zero where nothing flows.
    """
    state = {k: v.detach().to(dtype).requires_grad_() for k, v in state_dict.items() if v.is_floating_point()}
    tower = vision_tower(config).to(dtype)
    lm, tokens, visual = torch.zeros((), dtype=dtype), 0.0, 0
    cosines = {layer: torch.zeros((), dtype=dtype) for layer in config.pre_layers}
    viral_of, viral_count = {layer: torch.zeros((), dtype=dtype) for layer in config.viral.layers}, 0
    for sample in split_samples(micro_batches):
        sample["target"] = sample["target"].to(dtype)
        sums = sample_sums(sample, tower, state, config)
        lm, tokens, visual = lm + sums["lm"], tokens + sums["tokens"], visual + sums["visual"]
        cosines = {layer: cosines[layer] + sums["cosine"][layer] for layer in cosines}
        viral_of = {layer: viral_of[layer] + sums["viral"][layer] for layer in viral_of}
        viral_count += sums["viral_count"]

    loss_lm = lm / max(tokens, 1)
    by_layer = {layer: -total / max(visual, 1) for layer, total in cosines.items()}
    loss_pre = sum(by_layer.values(), torch.zeros((), dtype=dtype)) / max(len(by_layer), 1)
    viral_by_layer = {layer: total / max(viral_count, 1) for layer, total in viral_of.items()}
    loss_viral = sum(viral_by_layer.values(), torch.zeros((), dtype=dtype)) / max(len(viral_by_layer), 1)
    total = loss_lm + config.pre_weight * loss_pre + config.viral.weight * loss_viral
    grads = torch.autograd.grad(total, list(state.values()), allow_unused=True) if total.requires_grad else ()
    grads = grads or (None,) * len(state)
    return {
        "loss_lm": loss_lm.detach(),
        "loss_pre": loss_pre.detach(),
        "loss_pre_by_layer": {layer: value.detach() for layer, value in by_layer.items()},
        "loss_viral": loss_viral.detach(),
        "loss_viral_by_layer": {layer: value.detach() for layer, value in viral_by_layer.items()},
        "viral_count": viral_count,
        "tokens": tokens,
        "visual": visual,
        "grads": {
            name: torch.zeros_like(weight) if grad is None else grad
            for (name, weight), grad in zip(state.items(), grads, strict=True)
        },
    }


def _below(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
