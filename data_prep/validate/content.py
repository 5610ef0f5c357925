"""The samples: what the training's reader says of each, then its text, its images and how they go together."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from data_prep.validate.findings import Finding
from data_prep.validate.members import are_numbered, images_of
from data_prep.validate.shard import read_index
from nemo_pre.data.conversation import IMAGE_TAG, num_image_tags
from nemo_pre.data.decoding import UnreadablePicture, decode, decode_labels, header_size, is_one_colour
from nemo_pre.data.manifest import Shard
from nemo_pre.data.shards import ShardedSamples
from nemo_pre.data.tokenizer import load_backend

if TYPE_CHECKING:
    from tokenizers import Tokenizer

DIGEST_BYTES = 16


@dataclass(frozen=True)
class Limits:
    """``max_tokens`` counts only where ``tokenizer`` names a tokenizer's directory."""

    decode: bool = True
    max_pixels: int = 64_000_000
    max_characters: int = 32_768
    tokenizer: str | None = None
    max_tokens: int = 4096

    def __post_init__(self) -> None:
        for name in ("max_pixels", "max_characters", "max_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: give at least 1")
        if self.tokenizer is not None:
            load_tokenizer(self.tokenizer)


@dataclass(frozen=True)
class Chunk:
    """Samples of one shard, by their positions in its index."""

    shard_number: int
    name: str
    shard: Shard
    positions: Sequence[int]
    limits: Limits


@dataclass
class ChunkResult:
    """``digests``: 16 bytes for every question about an image; ``positions`` says whose.
    Of the samples ``asked`` for, those of a shard without a readable index are not ``checked``."""

    shard_number: int
    asked: int
    checked: int = 0
    findings: list[Finding] = field(default_factory=list)
    digests: bytearray = field(default_factory=bytearray)
    positions: list[int] = field(default_factory=list)


def check_chunk(chunk: Chunk) -> ChunkResult:
    """An index that is not readable leaves nothing to check here: the shard's own check has told so."""
    result = ChunkResult(chunk.shard_number, len(chunk.positions))
    try:
        index, samples = read_index(chunk.shard.index_path), ShardedSamples([chunk.shard])
    except ValueError:
        return result
    for position in chunk.positions:
        entry = index[position]

        def tell(reason: str, detail: str, key: str = entry["key"], position: int = position) -> None:
            result.findings.append(Finding(chunk.name, key, reason, detail, position))

        digests = _check_sample(samples, position, entry, chunk.limits, tell)
        result.checked += 1
        result.digests += b"".join(digests)
        result.positions += [position] * len(digests)
    return result


Tell = Callable[[str, str], None]


def _check_sample(
    samples: ShardedSamples, position: int, entry: dict[str, Any], limits: Limits, tell: Tell
) -> list[bytes]:
    """Returns the digests of its questions."""
    names = images_of(entry["members"])
    if "." in entry["key"]:
        tell("dot_in_key", "the index has a key with a dot")
    if not are_numbered(names):
        tell("image_members", f"images {', '.join(names)}: one without a number, or 0, 1, 2, ...")
    try:
        record = samples.read(position).record
        images = [samples.read_member(position, name) for name in names]
        mask = samples.read_member(position, "mask.png") if "mask.png" in entry["members"] else None
    except Exception as error:  # whatever it is, training would end with it
        tell("unreadable_sample", str(error) or repr(error))
        return []
    sizes = [
        _check_image(image, name, limits, "image_undecodable", tell) for name, image in zip(names, images, strict=True)
    ]
    if mask is not None:
        mask_size = _check_image(mask, "mask.png", limits, "mask_undecodable", tell, labels=True)
        if mask_size is not None and sizes and sizes[0] not in (None, mask_size):
            tell("mask_size", f"mask {_by(mask_size)}, image {_by(sizes[0])}")
    named = record.get("images") or record.get("image")
    if isinstance(named, list) and len(named) != len(names):
        tell("image_members", f"{len(names)} image(s), of which the record names {len(named)}")
    turns = _check_turns(record["conversations"], tell)
    if turns is None:
        return []
    questions = [value for speaker, value in turns if speaker == "human"]
    _check_tags(sum(map(num_image_tags, record["conversations"][::2])), len(names), tell)
    _check_length(turns, limits, tell)
    if not images:
        return []
    shown = b"".join(hashlib.sha256(image).digest() for image in images)
    asked = (question.replace(IMAGE_TAG, "").strip() for question in questions)
    return [hashlib.sha256(shown + question.encode()).digest()[:DIGEST_BYTES] for question in asked]


def _check_turns(conversation: Any, tell: Tell) -> list[tuple[str, str]] | None:
    """(speaker, text) of every message; None, and told, if they are not well-formed."""
    turns = []
    for number, message in enumerate(conversation):
        speaker, value = (message.get("from"), message.get("value")) if isinstance(message, dict) else (None, None)
        expected = ("human", "gpt")[number % 2]
        if speaker != expected or not isinstance(value, str):
            tell("turns", f"message {number} is not {{'from': '{expected}', 'value': text}}")
            return None
        try:
            value.encode()
        except UnicodeEncodeError as error:
            tell("broken_text", f"message {number}: {error}")
            return None
        turns.append((speaker, value))
    if not turns:
        tell("turns", "the conversation is empty")
        return None
    empty = [str(number) for number, (speaker, value) in enumerate(turns) if speaker == "gpt" and not value.strip()]
    # An image alone, without a question, is what pictures with pixel maps are for diagnostics.
    unanswered = turns[-1][0] == "human" and turns[-1][1].replace(IMAGE_TAG, "").strip()
    if empty or unanswered:
        tell("empty_answer", f"message {', '.join(empty)}" if empty else "the last question has no answer")
    return turns


def _check_tags(tags: int, images: int, tell: Tell) -> None:
    if tags != images:
        reason = "more_tags_than_images" if tags > images else "fewer_tags_than_images"
        tell("image_without_tag" if not tags else reason, f"{tags} {IMAGE_TAG} tag(s), {images} image(s)")


def _check_length(turns: list[tuple[str, str]], limits: Limits, tell: Tell) -> None:
    characters = sum(len(text) for _, text in turns)
    if characters > limits.max_characters:
        tell("too_long", f"{characters:,} characters")
    if limits.tokenizer is None:
        return
    tokenizer, unknown = load_tokenizer(limits.tokenizer)
    # In an answer the tag is text like any other.
    pieces = [piece for speaker, text in turns for piece in (text.split(IMAGE_TAG) if speaker == "human" else [text])]
    ids = [token for piece in pieces for token in tokenizer.encode(piece, add_special_tokens=False).ids]
    if len(ids) > limits.max_tokens:
        tell("too_long", f"{len(ids):,} tokens")
    if unknown in ids:
        tell("unknown_text", f"{ids.count(unknown)} of {len(ids)} tokens are unknown")


def _check_image(
    content: bytes, name: str, limits: Limits, reason: str, tell: Tell, labels: bool = False
) -> tuple[int, int] | None:
    """The image's (width, height), upright; None, and told, if it cannot be decoded."""
    try:
        width, height = header_size(content)
        if width * height > limits.max_pixels:
            tell("image_too_large", f"{name}: {_by((width, height))} pixels")
        elif limits.decode and labels:
            decode_labels(content)
        elif limits.decode and width * height > 1 and is_one_colour(picture := decode(content)):
            tell("one_colour", f"{name}: {_by((width, height))} pixels of {picture.getpixel((0, 0))}")
    except UnreadablePicture as error:
        tell("image_too_large" if error.too_large else reason, f"{name}: {error}")
        return None
    return width, height


def _by(size: tuple[int, int] | None) -> str:
    return "x".join(map(str, size or ()))


@lru_cache(maxsize=2)
def load_tokenizer(directory: str) -> tuple[Tokenizer, int | None]:
    """The tokenizer of a directory and the id of its unknown token.

    Raises:
        ValueError: there is none that can be read.
    """
    tokenizer = load_backend(directory)
    unknown = json.loads(tokenizer.to_str())["model"].get("unk_token")
    return tokenizer, None if unknown is None else tokenizer.token_to_id(unknown)
