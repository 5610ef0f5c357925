"""Which Hugging Face tensors make which tensor of a checkpoint, and back. The only place that knows both layouts.

Megatron holds a decoder layer's query, key and value projections as one matrix, query group by query group
``[q .. q, k, v]``, and the two input projections of the MLP one below the other. Norms have the names of Transformer
Engine's fused layers in a checkpoint, whatever layers wrote it. Everything else is a copy under another name.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from nemo_pre.config.derived import padded_vocab_size, projector_widths
from nemo_pre.config.schema import LanguageConfig, ModelConfig, VisionConfig
from nemo_pre.config.vision_families import class_tokens, encoder_tokens
from nemo_pre.huggingface.config_fields import listed
from nemo_pre.objectives.registry import training_only

Shape = tuple[int, ...]
LANGUAGE, LAYERS = "module.language_model.", "module.language_model.decoder.layers."
TOWER, PROJECTOR = "module.vision_model.", "module.vision_projection."
HF_LANGUAGE, HF_TOWER, HF_PROJECTOR = "language_model.", "vision_tower.", "multi_modal_projector."
HF_LAYERS = HF_LANGUAGE + "model.layers."

# transformers' newer names for the parts of a LLaVA; files on the hub have the older ones, and both load.
RENAMED = {
    "model.language_model.": "language_model.model.",
    "model.vision_tower.": HF_TOWER,
    "model.multi_modal_projector.": HF_PROJECTOR,
    "lm_head.": "language_model.lm_head.",
}
# Towers within a module of this name, up to transformers 4 and in the files of a whole CLIP or SigLIP.
INNER_MODULE, VISION_MODEL = ("clip", "siglip"), "vision_model."


@dataclass(frozen=True)
class Weight:
    """A tensor of a checkpoint and the Hugging Face tensors it is made of.

    Attributes:
        key, layer: name in the checkpoint, and the decoder layer (from 0) or None.
        shape: of one layer's part.
        parts: Hugging Face names and shapes, in the order :attr:`join` takes them.
        join: from the parts to the checkpoint's tensor; :attr:`cut` the other way.
    """

    key: str
    layer: int | None
    shape: Shape
    parts: Mapping[str, Shape]
    join: Callable[[list[Tensor]], Tensor]
    cut: Callable[[Tensor], list[Tensor]]


def language_weights(language: LanguageConfig) -> Iterator[Weight]:
    """Weights of the decoder, its embedding and its output layer."""
    d, f, vocabulary = language.hidden_size, language.ffn_hidden_size, language.vocab_size
    width = d // language.num_attention_heads
    kv = language.num_query_groups * width
    padded = padded_vocab_size(vocabulary)
    rows = partial(_padded_rows, rows=padded)
    unpadded = partial(_first_rows, rows=vocabulary)
    embedding = {HF_LANGUAGE + "model.embed_tokens.weight": (vocabulary, d)}
    yield Weight(LANGUAGE + "embedding.word_embeddings.weight", None, (padded, d), embedding, rows, unpadded)
    groups = language.num_query_groups
    for layer in range(language.num_layers):
        hf = f"{HF_LAYERS}{layer}."
        for kind in ("weight", "bias") if language.family == "qwen2" else ("weight",):
            inner = (d,) if kind == "weight" else ()
            yield Weight(
                f"{LAYERS}self_attention.linear_qkv.{kind}",
                layer,
                (d + 2 * kv, *inner),
                {f"{hf}self_attn.{q}_proj.{kind}": (size, *inner) for q, size in zip("qkv", (d, kv, kv), strict=True)},
                partial(_interleave, groups=groups),
                partial(_separate, groups=groups, sizes=(d, kv, kv)),
            )
        yield Weight(
            f"{LAYERS}mlp.linear_fc1.weight",
            layer,
            (2 * f, d),
            {f"{hf}mlp.gate_proj.weight": (f, d), f"{hf}mlp.up_proj.weight": (f, d)},
            torch.cat,
            _halves,
        )
        for key, name, shape in (
            ("self_attention.linear_proj.weight", "self_attn.o_proj.weight", (d, d)),
            ("mlp.linear_fc2.weight", "mlp.down_proj.weight", (d, f)),
            ("self_attention.linear_qkv.layer_norm_weight", "input_layernorm.weight", (d,)),
            ("mlp.linear_fc1.layer_norm_weight", "post_attention_layernorm.weight", (d,)),
        ):
            yield _copied(LAYERS + key, hf + name, shape, layer)
    yield _copied(LANGUAGE + "decoder.final_layernorm.weight", HF_LANGUAGE + "model.norm.weight", (d,))
    if not language.tie_embeddings:
        head = {HF_LANGUAGE + "lm_head.weight": (vocabulary, d)}
        yield Weight(LANGUAGE + "output_layer.weight", None, (padded, d), head, rows, unpadded)


def projector_weights(model: ModelConfig) -> Iterator[Weight]:
    """Weights of the two-layer MLP between encoder and decoder."""
    inputs, inner, outputs = projector_widths(model)
    for ours, theirs, shape in (("0", "linear_1", (inner, inputs)), ("2", "linear_2", (outputs, inner))):
        yield _copied(f"{PROJECTOR}{ours}.weight", f"{HF_PROJECTOR}{theirs}.weight", shape)
        yield _copied(f"{PROJECTOR}{ours}.bias", f"{HF_PROJECTOR}{theirs}.bias", shape[:1])


def tower_weights(vision: VisionConfig) -> Iterator[Weight]:
    """Weights of the vision tower, which is one module on both sides: those of the module that is built."""
    from nemo_pre.neva.vision import VisionTowerConfig

    with torch.device("meta"):
        tower = VisionTowerConfig(vision, seed=0).configure_model()
    for name, tensor in tower.state_dict().items():
        yield _copied(TOWER + name, HF_TOWER + name, tuple(tensor.shape))


def model_weights(model: ModelConfig) -> list[Weight]:
    """Every weight that the module of this model has."""
    return [*language_weights(model.language), *projector_weights(model), *tower_weights(model.vision)]


def checked_weights(model: ModelConfig, found: Mapping[str, Shape], where: object) -> list[Weight]:
    """Every weight of the model, once the checkpoint is known to hold just these, and parts that only training has.

    Args:
        found: shape of every tensor of the checkpoint, by key; of decoder layers' with the layers in front.
        where: the checkpoint.

    Raises:
        ValueError: one is missing, has another shape, or has no place in the model.
    """
    weights = model_weights(model)
    shapes = {
        weight.key: weight.shape if weight.layer is None else (model.language.num_layers, *weight.shape)
        for weight in weights
    }
    if missing := [key for key in shapes if key not in found]:
        raise ValueError(f"{where} has no {listed(missing)}, which its config.yaml asks for: name a whole checkpoint.")
    for key, shape in shapes.items():
        if tuple(found[key]) != shape:
            raise ValueError(
                f"{key} in {where} has shape {list(found[key])} but its config.yaml makes it {list(shape)}."
            )
    # The optimizer's tensors begin with its own name.
    beside = [key for key in found if key.startswith("module.") and key not in shapes]
    if unknown := [key for key in beside if not key.removeprefix("module.").startswith(training_only())]:
        raise ValueError(
            f"{where} has {listed(unknown)}, which has no place in the model: its config.yaml is not of it."
        )
    return weights


def resampled_positions(weight: Weight, vision: VisionConfig) -> Weight:
    """The tower's position embeddings for ``vision.image_size``, if this is them and they are for another; else
    ``weight`` as it is."""
    if "position_embedding" not in weight.key:
        return weight
    *leading, found, width = weight.shape
    wanted = encoder_tokens(vision)
    if found == wanted:
        return weight
    before = class_tokens(vision)
    resample = partial(_resampled, class_tokens=before, side=math.isqrt(wanted - before))
    return replace(weight, shape=(*leading, wanted, width), join=resample)


def hub_name(name: str, family: str | None = None) -> str:
    """A LLaVA's tensor under the name that files on the hub use.

    Args:
        family: of its vision tower; transformers 5 leaves out a part of the names of some.
    """
    name = next((old + name.removeprefix(new) for new, old in RENAMED.items() if name.startswith(new)), name)
    if family in INNER_MODULE and name.startswith(HF_TOWER) and not name.startswith(HF_TOWER + VISION_MODEL):
        return HF_TOWER + VISION_MODEL + name.removeprefix(HF_TOWER)
    return name


def _copied(key: str, name: str, shape: Shape, layer: int | None = None) -> Weight:
    return Weight(key, layer, shape, {name: shape}, _only, _alone)


def _only(parts: list[Tensor]) -> Tensor:
    return parts[0]


def _resampled(parts: list[Tensor], class_tokens: int, side: int) -> Tensor:
    """Position embeddings for another grid, as ``interpolate_pos_encoding`` of ``transformers``' towers makes them: a
    square grid, bicubic, without antialiasing."""
    (table,) = parts
    rows = table.reshape(-1, table.shape[-1])
    first, patches = rows[:class_tokens], rows[class_tokens:]
    old = math.isqrt(len(patches))
    grid = patches.float().reshape(1, old, old, -1).permute(0, 3, 1, 2)
    grid = torch.nn.functional.interpolate(grid, size=(side, side), mode="bicubic", align_corners=False)
    patches = grid.permute(0, 2, 3, 1).reshape(side * side, -1).to(table.dtype)
    return torch.cat([first, patches]).reshape(*table.shape[:-2], -1, table.shape[-1])


def _alone(tensor: Tensor) -> list[Tensor]:
    return [tensor]


def _padded_rows(parts: list[Tensor], rows: int) -> Tensor:
    """Rows that belong to no word are zero."""
    (tensor,) = parts
    padded = tensor.new_zeros(rows, *tensor.shape[1:])
    padded[: len(tensor)] = tensor
    return padded


def _first_rows(tensor: Tensor, rows: int) -> list[Tensor]:
    return [tensor[:rows]]


def _halves(tensor: Tensor) -> list[Tensor]:
    return list(tensor.chunk(2))


def _interleave(parts: list[Tensor], groups: int) -> Tensor:
    """Query, key and value rows, query group by query group."""
    inner = parts[0].shape[1:]
    return torch.cat([part.reshape(groups, -1, *inner) for part in parts], dim=1).reshape(-1, *inner)


def _separate(tensor: Tensor, groups: int, sizes: tuple[int, ...]) -> list[Tensor]:
    inner = tensor.shape[1:]
    grouped = tensor.reshape(groups, -1, *inner).split([size // groups for size in sizes], dim=1)
    return [part.reshape(-1, *inner) for part in grouped]
