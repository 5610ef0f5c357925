"""What an exported model answers to validation pictures, asked through ``transformers`` as its users would."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemo_pre.data.conversation import IMAGE_TAG
from nemo_pre.data.decoding import decoded
from nemo_pre.data.errors import SampleError
from nemo_pre.data.manifest import read_manifest, verify_shards
from nemo_pre.data.scoring import normalise
from nemo_pre.data.shards import RawSample, ShardedSamples
from nemo_pre.evaluation.prompts import chat_message

if TYPE_CHECKING:
    from PIL.Image import Image

SPARE_TOKENS = 2  # beyond the longest expected answer: its end, and one more to see that an answer is too long
LONGEST_SIDE = 512  # pixels of a picture in the rows


@dataclass(frozen=True)
class SampleAnswer:
    """``picture`` is a PNG of at most 512 pixels a side; ``question_type`` is "all" where the data states none."""

    key: str
    picture: bytes
    question: str
    expected: str
    answer: str
    question_type: str

    @property
    def correct(self) -> bool:
        return normalise(self.answer) == normalise(self.expected)


@dataclass(frozen=True)
class _Question:
    key: str
    picture: Image
    text: str  # with the image's tag
    expected: str
    question_type: str

    @property
    def shown(self) -> str:
        return self.text.replace(IMAGE_TAG, "").strip()


def sample_answers(
    model: str | Path, data: str | Path, count: int = 12, batch_size: int = 4, split: str = "val"
) -> list[SampleAnswer]:
    """Greedy answers to the first question of the first ``count`` samples with a picture.

    ``model`` is a local Hugging Face directory of an image-text-to-text model, whose chat template renders the
    prompt; ``data`` a directory that ``nemo-pre data`` wrote. A GPU is used where there is one, in the weights' dtype.

    Raises:
        ValueError: the directory holds no such model, or the data cannot be read.
    """
    questions = list(_questions(data, split, count))
    if not questions:
        return []
    processor, network = _load(Path(model))
    longest = max(len(processor.tokenizer(row.expected, add_special_tokens=False).input_ids) for row in questions)
    answers: list[str] = []
    for start in range(0, len(questions), batch_size):
        answers += _answer(processor, network, questions[start : start + batch_size], longest + SPARE_TOKENS)
    return [
        SampleAnswer(row.key, _png(row.picture), row.shown, row.expected, answer, row.question_type)
        for row, answer in zip(questions, answers, strict=True)
    ]


def _questions(data: str | Path, split: str, count: int) -> Iterator[_Question]:
    manifest = read_manifest(data, "data")
    if not manifest.shards.get(split):
        raise ValueError(f"{manifest.directory} has no {split} shards: prepare the data again")
    verify_shards(manifest.shards[split])
    samples = ShardedSamples(manifest.shards[split])
    for position in range(len(samples)):
        if count <= 0:
            return
        raw = samples.read(position)
        if raw.image is not None:
            count -= 1
            yield _question(raw)


def _question(raw: RawSample) -> _Question:
    try:
        question, expected = (raw.record["conversations"][turn]["value"] for turn in (0, 1))
    except (LookupError, TypeError) as error:
        raise SampleError(f"{raw.where} has no question with an answer: prepare the data again") from error
    picture = decoded(raw.image or b"", raw.where)
    types = raw.record.get("question_types") or ["all"]
    return _Question(raw.key, picture, question, expected, types[0])


def _load(model: Path) -> tuple[Any, Any]:
    config = model / "config.json"
    if not config.is_file():
        raise ValueError(f"model={model} has no config.json: give the directory of an exported Hugging Face model.")
    import torch

    from nemo_pre.huggingface.loading import load_network, load_processor, needs_own_code

    try:
        how = {"local_files_only": True, "trust_remote_code": needs_own_code(model)}
        processor = load_processor(model, **how)
        network = load_network(model, dtype="auto", **how)
    except (OSError, ValueError, KeyError, ImportError, AttributeError) as error:
        first = (str(error).strip() or repr(error)).splitlines()[0]
        raise ValueError(f"model={model} cannot be loaded as an image-text-to-text model: {first}") from error
    if getattr(processor, "chat_template", None) is None:
        raise ValueError(f"model={model} has no chat template to ask with: export the model with its processor.")
    processor.tokenizer.padding_side = "left"  # the answers of a batch start at the same place
    return processor, network.eval().to("cuda" if torch.cuda.is_available() else "cpu")


def _answer(processor: Any, network: Any, questions: Sequence[_Question], max_new_tokens: int) -> list[str]:
    import torch

    inputs = processor.apply_chat_template(
        [_conversation(row) for row in questions],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        padding=True,
        return_tensors="pt",
    ).to(network.device, dtype=network.dtype)
    with torch.inference_mode():
        tokens = network.generate(
            **inputs,
            max_new_tokens=max_new_tokens,
            do_sample=False,
            num_beams=1,
            pad_token_id=processor.tokenizer.pad_token_id,
        )
    prompt = inputs["input_ids"].shape[1]
    texts = processor.tokenizer.batch_decode(tokens[:, prompt:], skip_special_tokens=True)
    return [text.strip() for text in texts]


def _conversation(row: _Question) -> list[dict[str, Any]]:
    message = chat_message(row.text, num_images=1)
    for part in message["content"]:
        if part["type"] == "image":
            part["image"] = row.picture
    return [message]


def _png(picture: Image) -> bytes:
    small = picture.copy()
    small.thumbnail((LONGEST_SIDE, LONGEST_SIDE))
    file = io.BytesIO()
    small.save(file, format="PNG", optimize=True)
    return file.getvalue()
