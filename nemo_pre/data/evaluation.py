"""Validation by generation: prompts without their answers, to be answered by the model and scored."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from nemo_pre.config.run import RunConfig
from nemo_pre.data.conversation import encode_prompt
from nemo_pre.data.features import CachedFeatures
from nemo_pre.data.manifest import read_manifest, verify_shards
from nemo_pre.data.preprocessing import build_preprocessing
from nemo_pre.data.shards import ShardedSamples

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class ValidationSample:
    """``prompt`` int64 [t] ends where the first answer starts, -200 stands for an image; ``images`` as
    :meth:`~nemo_pre.data.dataset.Preprocessing.encode_image` gives them, or their features [1, tokens, d_vision];
    ``answer`` is the expected text;
    ``question_type`` is "all" where data states none."""

    key: str
    prompt: torch.Tensor
    images: list[torch.Tensor]
    answer: str
    question_type: str


def load_validation_samples(config: RunConfig, count: int, tokenizer: Any = None) -> list[ValidationSample]:
    """The first ``count`` samples of the val split (fewer if it has fewer), each with its first question.

    Raises:
        ValueError: the data is missing, or a sample cannot be read.
    """
    manifest = read_manifest(config.data.path)
    if not manifest.shards.get("val"):
        raise ValueError(f"{manifest.directory} has no val shards: prepare the data again")
    verify_shards(manifest.shards["val"])
    samples = ShardedSamples(manifest.shards["val"])
    how = build_preprocessing(config, tokenizer)
    features = CachedFeatures(how.features, samples.shards) if how.features else None
    return [_load(samples, features, position, how) for position in range(min(count, len(samples)))]


def _load(samples: ShardedSamples, features: CachedFeatures | None, position: int, how: Any) -> ValidationSample:
    import torch

    raw = samples.read(position, images=features is None)
    images = [how.encode_image(image, raw.where) for image in raw.images]
    if features is not None:
        images = features.read(position, raw.where)
    conversation = raw.record["conversations"]
    prompt = encode_prompt(conversation, how.tokenizer, how.chat_template, len(images), raw.where)
    types = raw.record.get("question_types") or ["all"]
    return ValidationSample(
        raw.key, torch.tensor(prompt, dtype=torch.int64), images, conversation[1]["value"], types[0]
    )
