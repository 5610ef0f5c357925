"""NeVA + PRe + VIRAL + LaVer in plain torch: the oracle of a whole LaVer step.

Slow and obvious on purpose, like :mod:`tests.reference.neva_pre`, whose vision tower, projector, norms and sample
layout it takes; attention, positions, masking, teacher and losses are written out here. One sample and one image at a
time, every rotation and every Gram entry by itself where that is affordable.

    L     = L_LM + pre_weight L_PRe + viral.weight L_VIRAL + mim_weight L_MIM + gram_weight L_CGA
    L_MIM = -(1/N_masked) sum_masked softmax((z^ - center) / tau_tea) . log softmax(z~ / tau_stu)
    L_CGA = (1/N_entries) sum_images || max(0, G(z~) - G(z^)) ||_F^2

z~ is the head's output on the student's branch, z^ the teacher's on the unmasked branch, both after the final norm.
Source: LaVer, arXiv 2512.06281; the variants are those of its released code (4ce7bd9).

Legend of shape suffixes: s sequence, d decoder width, n visual tokens, k the head's output.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.reference.neva_pre import (
    IMAGE_TOKEN,
    LM,
    NO_LABEL,
    ReferenceConfig,
    cosine,
    encode_image,
    expand_sample,
    prediction_head,
    project,
    rms_norm,
    split_samples,
    swiglu,
    vision_tower,
)
from tests.reference.viral import viral_sums

Place = tuple[int, int, int]  # time, row, column
Grids = tuple[int, int] | list[tuple[int, int]]  # rows and columns of every image, or of each of a sample's images


@dataclass(frozen=True)
class LaVerReferenceConfig(ReferenceConfig):
    attention: str = "mixed"  # causal | mixed
    rope: str = "2d"  # 1d | 2d | mrope
    rope_sections: tuple[int, ...] | None = None
    laver: bool = True
    sequence: str = "images"  # images | whole
    mim_weight: float = 1.0
    gram_weight: float = 1.0
    student_temperature: float = 0.1
    teacher_temperature: float = 0.04
    mim_reduction: str = "global"  # global | micro_batch | image
    gram_reduction: str = "global"  # global | image
    gram_clipped: bool = True
    gram_scope: str = "image"  # image | micro_batch
    gram_positions: str = "all"  # all | masked
    mask_token_id: int | None = None


@dataclass(frozen=True)
class Token:
    """A position of a sequence: where its embedding comes from, and where it lies."""

    image: int | None  # of the sample, or None for text
    visual: int | None  # number among the sample's visual tokens
    text: int | None  # token id
    place: Place


def place_in_image(visual: int, grid: Grids) -> tuple[int, int, int, tuple[int, int]]:
    """Image, row and column of a sample's visual token, and the image's grid."""
    if isinstance(grid, tuple):
        grid = [grid] * (visual // (grid[0] * grid[1]) + 1)
    for image, (height, width) in enumerate(grid):
        if visual < height * width:
            return image, visual // width, visual % width, (height, width)
        visual -= height * width
    raise AssertionError("more visual tokens than the grids have")


def lay_places(source: list[tuple[str, int]], grid: Grids, rope: str) -> list[Token]:
    """Where every token of a sample lies: text at (p, p, p), patch (i, j) of an image that starts at s at
    (s, s + i, s + j), and what follows at the largest position so far plus one; ``1d`` counts every token."""
    tokens, next_position = [], 0
    for index, (kind, value) in enumerate(source):
        if kind == "text":
            place = (next_position,) * 3
            tokens.append(Token(None, None, value, place if rope != "1d" else (index,) * 3))
            next_position += 1
            continue
        image, i, j, (height, width) = place_in_image(value, grid)
        place = (next_position, next_position + i, next_position + j)
        tokens.append(Token(image, value, None, place if rope != "1d" else (index,) * 3))
        if (i, j) == (height - 1, width - 1):
            next_position += max(height, width)
    return tokens


def alone(tokens: list[Token], image: int, grid: Grids, rope: str) -> list[Token]:
    """The image of a sample as a sequence of its own, starting at 0."""
    found = []
    for token in tokens:
        if token.image == image:
            assert token.visual is not None
            _, i, j, _ = place_in_image(token.visual, grid)
            place = (len(found),) * 3 if rope == "1d" else (0, i, j)
            found.append(Token(image, token.visual, None, place))
    return found


def angles(places: list[Place], config: LaVerReferenceConfig, head_dim: int, dtype: torch.dtype) -> Tensor:
    """Rotation angle ``[s, head_dim / 2]`` of every token and frequency."""
    half = head_dim // 2
    if config.rope == "1d":
        axes = [0] * half
    elif config.rope == "2d" and config.rope_sections is None:
        axes = [1 + k % 2 for k in range(half)]
    else:
        sections = config.rope_sections or (half // 4, 3 * half // 8, half - half // 4 - 3 * half // 8)
        names = (1, 2) if config.rope == "2d" else (0, 1, 2)
        axes = [axis for axis, size in zip(names, sections, strict=True) for _ in range(size)]
    rows = [[place[axes[k]] * config.rotary_base ** (-2 * k / head_dim) for k in range(half)] for place in places]
    return torch.tensor(rows, dtype=dtype)


def turn(x: Tensor, angle: Tensor) -> Tensor:
    """``[s, head_dim]`` with the two halves of a head paired."""
    first, second = x.chunk(2, dim=-1)
    cos, sin = angle.cos(), angle.sin()
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def sees(query: int, key: int, tokens: list[Token], mixed: bool) -> bool:
    same_image = tokens[query].image is not None and tokens[query].image == tokens[key].image
    return key <= query or (mixed and same_image)


def attention(x_sd: Tensor, w: dict[str, Tensor], angle: Tensor, mask: Tensor, config: ReferenceConfig) -> Tensor:
    length, width = x_sd.shape
    groups, heads = config.num_query_groups, config.num_attention_heads
    head_dim = config.head_dim or width // heads
    per_group = heads // groups
    qkv = F.linear(x_sd, w["self_attention.linear_qkv.weight"], w.get("self_attention.linear_qkv.bias"))
    qkv = qkv.view(length, groups, per_group + 2, head_dim)
    context = []
    for group in range(groups):
        key, value = turn(qkv[:, group, per_group], angle), qkv[:, group, per_group + 1]
        for head in range(per_group):
            score = turn(qkv[:, group, head], angle) @ key.T / math.sqrt(head_dim)
            context.append(score.masked_fill(~mask, float("-inf")).softmax(-1) @ value)
    return F.linear(torch.cat(context, dim=-1), w["self_attention.linear_proj.weight"])


def decode(
    x_sd: Tensor, tokens: list[Token], weights: dict[str, Tensor], config: LaVerReferenceConfig
) -> list[Tensor]:
    """Hidden states: entry 0 the input, ``l`` the output of layer ``l``, the last the final norm's."""
    head_dim = config.head_dim or x_sd.shape[1] // config.num_attention_heads
    angle = angles([token.place for token in tokens], config, head_dim, x_sd.dtype)
    mixed = config.attention == "mixed"
    mask = torch.tensor([[sees(q, k, tokens, mixed) for k in range(len(tokens))] for q in range(len(tokens))])
    hidden = [x_sd]
    for layer in range(config.num_layers):
        w = _below(weights, f"{LM}decoder.layers.{layer}.")
        normed = rms_norm(x_sd, w["input_layernorm.weight"], config.layernorm_epsilon)
        x_sd = x_sd + attention(normed, w, angle, mask, config)
        x_sd = x_sd + swiglu(rms_norm(x_sd, w["pre_mlp_layernorm.weight"], config.layernorm_epsilon), w)
        hidden.append(x_sd)
    hidden.append(rms_norm(x_sd, weights[f"{LM}decoder.final_layernorm.weight"], config.layernorm_epsilon))
    return hidden


def visual_head(x_nd: Tensor, weights: dict[str, Tensor]) -> Tensor:
    w = _below(weights, "laver_head.")
    inner = F.gelu(F.linear(x_nd, w["fc1.weight"], w["fc1.bias"]))
    return F.linear(F.gelu(F.linear(inner, w["fc2.weight"], w["fc2.bias"])), w["fc3.weight"])


def branch_logits(
    sequence: list[Token],
    visual_nd: Tensor,
    masked: list[bool],
    weights: dict[str, Tensor],
    state: dict[str, Tensor],
    config: LaVerReferenceConfig,
) -> Tensor:
    """Logits ``[n, k]`` at the visual tokens of a branch; ``masked`` by visual token of the sample."""
    embedding = state[f"{LM}embedding.word_embeddings.weight"]
    mask_token = state["laver_mask_token"] if config.mask_token_id is None else embedding[config.mask_token_id]
    rows = []
    for token in sequence:
        if token.visual is None:
            rows.append(embedding[token.text])
        else:
            rows.append(mask_token if masked[token.visual] else visual_nd[token.visual])
    states = decode(torch.stack(rows), sequence, weights, config)[-1]
    return visual_head(states[[i for i, token in enumerate(sequence) if token.visual is not None]], weights)


@dataclass
class SampleTerms:
    """What a sample contributes; logits and masks image by image."""

    lm: Tensor
    tokens: float
    visual: int
    cosines: dict[int, Tensor]
    viral: dict[int, Tensor]
    viral_count: int
    student: list[Tensor]
    teacher: list[Tensor]
    masked: list[list[bool]]


def sample_terms(
    sample: dict[str, Any],
    masks: list[list[bool]],
    tower: torch.nn.Module,
    state: dict[str, Tensor],
    teacher: dict[str, Tensor],
    config: LaVerReferenceConfig,
) -> SampleTerms:
    features = [encode_image(image, tower, state, config) for image in sample["images"]]
    visual = [project(each, state) for each in features]
    per_image = [len(tokens) for tokens in visual]
    visual_nd = torch.cat(visual) if visual else torch.empty(0)
    source, labels, loss_mask = expand_sample(
        sample["tokens"], sample["labels"], sample["loss_mask"], per_image, config.max_sequence_length
    )
    grids = [
        image[1] if isinstance(image, tuple) else (math.isqrt(size), math.isqrt(size))
        for image, size in zip(sample["images"], per_image, strict=True)
    ]
    tokens = lay_places(source, grids, config.rope)

    embedding = state[f"{LM}embedding.word_embeddings.weight"]
    rows = [visual_nd[index] if kind == "image" else embedding[index] for kind, index in source]
    hidden = decode(torch.stack(rows), tokens, state, config)
    output = embedding if config.tie_embeddings else state[f"{LM}output_layer.weight"]
    logits = F.linear(hidden[-1], output)
    zero = embedding.new_zeros(())
    lm, count = zero, 0.0
    for position, (label, weight) in enumerate(zip(labels, loss_mask, strict=True)):
        if weight:
            assert label != NO_LABEL
            lm, count = lm - weight * logits[position].log_softmax(-1)[label], count + weight
    cosines = dict.fromkeys(config.pre_layers, zero)
    for layer in config.pre_layers:
        for position, token in enumerate(tokens):
            if token.visual is not None:
                prediction = prediction_head(hidden[layer][position], layer, state, config)
                cosines[layer] = cosines[layer] + cosine(prediction, visual_nd[token.visual].detach())

    num_visual = sum(token.visual is not None for token in tokens)
    by_image: dict[int, list[tuple[int, int]]] = {}
    for position, token in enumerate(tokens):
        if token.image is not None and token.visual is not None:
            by_image.setdefault(token.image, []).append((position, token.visual))
    targets_nt = torch.cat(features) if config.viral.target == "encoder" and features else sample["target"]
    viral, viral_count = viral_sums(list(by_image.values()), hidden, targets_nt, state, config.viral)
    terms = SampleTerms(lm, count, num_visual, cosines, viral, viral_count, [], [], [])
    if not config.laver:
        return terms
    images = sorted({token.image for token in tokens if token.image is not None})
    flat = [masked for image in masks for masked in image]
    none = [False] * len(flat)
    detached = {name: weight.detach() for name, weight in state.items()}
    for image in images:
        mine = [token for token in tokens if token.image == image]
        if config.sequence == "images":
            sequence, rows_of = alone(tokens, image, grids, config.rope), list(range(len(mine)))
        else:
            sequence = tokens
            every = [token for token in tokens if token.visual is not None]
            rows_of = [i for i, token in enumerate(every) if token.image == image]
        terms.student.append(branch_logits(sequence, visual_nd, flat, state, state, config)[rows_of])
        with torch.no_grad():
            seen = branch_logits(sequence, visual_nd.detach(), none, teacher, detached, config)
        terms.teacher.append(seen[rows_of])
        terms.masked.append([flat[token.visual] for token in mine if token.visual is not None])
    return terms


def masked_prediction(student_k: Tensor, teacher_k: Tensor, center: Tensor | None, config: Any) -> Tensor:
    target = ((teacher_k - (0 if center is None else center)) / config.teacher_temperature).softmax(-1)
    return -(target * (student_k / config.student_temperature).log_softmax(-1)).sum()


def gram(student_nk: Tensor, teacher_nk: Tensor, clipped: bool) -> Tensor:
    """Sum over all pairs of tokens, with themselves."""
    student = student_nk / student_nk.norm(dim=-1, keepdim=True)
    teacher = teacher_nk / teacher_nk.norm(dim=-1, keepdim=True)
    difference = student @ student.T - teacher @ teacher.T
    return (difference.clamp(min=0) if clipped else difference).pow(2).sum()


def reference_laver_step(
    state_dict: dict[str, Tensor],
    teacher_dict: dict[str, Tensor],
    config: LaVerReferenceConfig,
    micro_batches: list[dict[str, Any]],
    masks: list[list[list[bool]]],
    center: Tensor | None = None,
    dtype: torch.dtype = torch.float64,
) -> dict[str, Any]:
    """Losses and gradients of one step over the global batch.

    ``masks[m][i]`` are those of image ``i`` of micro-batch ``m``, a boolean per token before any cut. ``teacher_dict``
    has the decoder's and the head's weights under the student's names.
    """
    state = {k: v.detach().to(dtype).requires_grad_() for k, v in state_dict.items() if v.is_floating_point()}
    teacher = {name: weight.detach().to(dtype) for name, weight in teacher_dict.items()}
    center = None if center is None else center.to(dtype)
    tower = vision_tower(config).to(dtype)
    zero = torch.zeros((), dtype=dtype)
    lm, tokens, cosines = zero, 0.0, dict.fromkeys(config.pre_layers, zero)
    mim, micro_batch_means, gram_sum, entropy = zero, [], zero, zero
    similarity, pairs, visual, masked, entries = zero, 0, 0, 0, 0
    images = 0
    viral_of, viral_count = dict.fromkeys(config.viral.layers, zero), 0

    for batch, of_batch in zip(micro_batches, masks, strict=True):
        left = list(of_batch)
        student_of, teacher_of, masked_of = [], [], []
        for sample in split_samples([batch]):
            own = [left.pop(0) for token in sample["tokens"] if token == IMAGE_TOKEN]
            sample["target"] = sample["target"].to(dtype)
            terms = sample_terms(sample, own, tower, state, teacher, config)
            lm, tokens = lm + terms.lm, tokens + terms.tokens
            cosines = {layer: cosines[layer] + terms.cosines[layer] for layer in cosines}
            visual += terms.visual
            viral_of = {layer: viral_of[layer] + terms.viral[layer] for layer in viral_of}
            viral_count += terms.viral_count
            student_of += terms.student
            teacher_of += terms.teacher
            masked_of += terms.masked

        here, here_masked = zero, 0
        for student, target, mask in zip(student_of, teacher_of, masked_of, strict=True):
            for token in range(len(mask)):
                if mask[token]:
                    here = here + masked_prediction(student[token], target[token], center, config)
                    here_masked += 1
                    p = ((target[token] - (0 if center is None else center)) / config.teacher_temperature).softmax(-1)
                    entropy = entropy + torch.special.entr(p).sum()
            unit = student.detach() / student.detach().norm(dim=-1, keepdim=True)
            similarity = similarity + (unit @ unit.T).sum() - len(mask)
            pairs += len(mask) * (len(mask) - 1)
        mim, masked, images = mim + here, masked + here_masked, images + len(student_of)
        micro_batch_means.append(here / max(here_masked, 1))

        sets = [
            ((student[mask], target[mask]) if config.gram_positions == "masked" else (student, target))
            for student, target, mask in zip(student_of, teacher_of, masked_of, strict=True)
        ]
        if config.gram_scope == "micro_batch" and sets:
            sets = [(torch.cat([s for s, _ in sets]), torch.cat([t for _, t in sets]))]
        for student, target in sets:
            gram_sum = gram_sum + gram(student, target, config.gram_clipped)
            entries += len(student) ** 2

    loss_lm = lm / max(tokens, 1)
    loss_pre = sum((-c / max(visual, 1) for c in cosines.values()), zero)
    loss_pre = loss_pre / max(len(cosines), 1)
    loss_mim = mim / max(masked, 1)
    if config.mim_reduction == "micro_batch":
        loss_mim = sum(micro_batch_means, zero) / len(micro_batch_means)
    if config.mim_reduction == "image":
        loss_mim = mim / max(images, 1)
    loss_gram = gram_sum / max(images if config.gram_reduction == "image" else entries, 1)
    loss_viral = sum(viral_of.values(), zero) / max(viral_count, 1) / max(len(viral_of), 1)
    total = loss_lm + config.pre_weight * loss_pre + config.mim_weight * loss_mim + config.gram_weight * loss_gram
    total = total + config.viral.weight * loss_viral
    grads = torch.autograd.grad(total, list(state.values()), allow_unused=True)
    return {
        "loss_lm": loss_lm.detach(),
        "loss_pre": loss_pre.detach(),
        "loss_viral": loss_viral.detach(),
        "viral_count": viral_count,
        "loss_mim": loss_mim.detach(),
        "loss_gram": loss_gram.detach(),
        "similarity": similarity / max(pairs, 1),
        "teacher_entropy": (entropy / max(masked, 1)).detach(),
        "tokens": tokens,
        "visual": visual,
        "masked": masked,
        "gram_entries": entries,
        "grads": {
            name: torch.zeros_like(weight) if grad is None else grad
            for (name, weight), grad in zip(state.items(), grads, strict=True)
        },
    }


def _below(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
