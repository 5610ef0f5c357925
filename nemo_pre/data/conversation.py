"""A LLaVA conversation as token ids, shifted labels and a prompt to generate from.

A conversation is ``[{"from": "human", "value": "<image>\\n..."}, {"from": "gpt", "value": "..."}, ...]``. The
text is tokenized piece by piece between images and ends of turns, and a token is a target exactly if some of
its characters belong to an answer; so no answer is searched for in the ids, and no tokenizer's merging of the
character before an answer can shift the mask by one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from nemo_pre.data.errors import SampleError

IMAGE_TAG = "<image>"
IMAGE_TOKEN_INDEX = -200  # NeVA's placeholder: one id stands for all visual tokens of an image
IGNORE_INDEX = -100


@dataclass(frozen=True)
class ChatTemplate:
    """``system``, then per turn ``before_question`` question ``before_answer`` [``answer_lead`` answer eos].

    What is in brackets is trained on and generated. ``keep_question`` false leaves only the image of a
    question, as LLaVA does for captions in its first stage.
    """

    system: str = ""
    before_question: str = ""
    before_answer: str = ""
    answer_lead: str = ""
    keep_question: bool = True


VICUNA_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions. "
)
TEMPLATES = {
    "plain": ChatTemplate(before_answer="\n"),
    "vicuna_v1": ChatTemplate(VICUNA_SYSTEM, before_question="USER: ", before_answer=" ASSISTANT:", answer_lead=" "),
    "caption": ChatTemplate(keep_question=False),
}


@dataclass(frozen=True)
class Encoded:
    """``tokens[t]`` predicts ``labels[t]`` (-100: nothing to predict); ``cut`` if the sample was too long."""

    tokens: list[int]
    labels: list[int]
    cut: bool


@dataclass(frozen=True)
class _Piece:
    """Text, an image (``text`` None), or the end of an answer (``text`` empty)."""

    text: str | None
    target: bool = False


def encode(
    conversation: list[dict[str, str]], tokenizer: Any, template: str, max_tokens: int, num_images: int, where: str
) -> Encoded:
    """Token ids and labels of a whole conversation, at most ``max_tokens`` of them (an image counts as one).

    ``tokenizer`` is a ``transformers`` fast tokenizer; ``where`` names the sample in errors.

    Raises:
        SampleError: turns out of order, or image tags that do not match ``num_images``, or a cut image.
        ValueError: unknown template; a tokenizer that does not know the text.
    """
    pieces = _render(_turns(conversation, where), _template(template), answered=True)
    ids, targets = _tokenize(pieces, tokenizer, where)
    cut = len(ids) > max_tokens + 1
    ids, targets = ids[: max_tokens + 1], targets[: max_tokens + 1]
    _check_images(pieces, num_images, where)
    if ids[:-1].count(IMAGE_TOKEN_INDEX) < num_images:
        raise SampleError(f"{where} is cut to {max_tokens} text tokens before its image: raise data.sequence_length")
    labels = [token if target else IGNORE_INDEX for token, target in zip(ids, targets, strict=True)]
    return Encoded(ids[:-1], labels[1:], cut)


def encode_prompt(
    conversation: list[dict[str, str]], tokenizer: Any, template: str, num_images: int, where: str
) -> list[int]:
    """Token ids up to where the first answer would start; the conversation may end with the question."""
    turns = _turns(conversation, where)
    pieces = _render(turns[:1], _template(template), answered=False)
    _check_images(pieces, num_images, where)
    return _tokenize(pieces, tokenizer, where)[0]


def _template(name: str) -> ChatTemplate:
    if name not in TEMPLATES:
        raise ValueError(f"data.chat_template={name} is not one of {', '.join(TEMPLATES)}")
    return TEMPLATES[name]


def _turns(conversation: list[dict[str, str]], where: str) -> list[tuple[str, str]]:
    """(question, answer) pairs; a question without an answer at the end gets an empty one."""
    try:
        messages = [(message["from"], message["value"]) for message in conversation]
    except (KeyError, TypeError) as error:
        raise SampleError(f"{where}: a message needs 'from' and 'value'") from error
    speakers = [speaker for speaker, _ in messages]
    if not messages or speakers != [("human", "gpt")[i % 2] for i in range(len(speakers))]:
        raise SampleError(f"{where}: messages must alternate human, gpt; found {', '.join(speakers) or 'none'}")
    if any(not isinstance(value, str) for _, value in messages):
        raise SampleError(f"{where}: the value of a message must be text")
    texts = [value for _, value in messages] + [""] * (len(messages) % 2)
    return list(zip(texts[::2], texts[1::2], strict=True))


def _render(turns: list[tuple[str, str]], template: ChatTemplate, answered: bool) -> list[_Piece]:
    pieces = [_Piece(template.system)]
    for question, answer in turns:
        pieces.append(_Piece(template.before_question))
        if template.keep_question:
            for number, text in enumerate(question.split(IMAGE_TAG)):
                pieces += [_Piece(None), _Piece(text)] if number else [_Piece(text)]
        else:
            pieces += [_Piece(None)] * question.count(IMAGE_TAG)
        pieces.append(_Piece(template.before_answer))
        if answered and answer:
            pieces += [_Piece(template.answer_lead + answer, target=True), _Piece("", target=True)]
    return [piece for piece in pieces if piece.text or piece.text is None or piece.target]


def _check_images(pieces: list[_Piece], num_images: int, where: str) -> None:
    tags = sum(piece.text is None for piece in pieces)
    if tags != num_images:
        raise SampleError(
            f"{where} has {num_images} image(s) and {tags} {IMAGE_TAG} tag(s) in its questions: "
            f"give each image one tag"
        )


def _tokenize(pieces: list[_Piece], tokenizer: Any, where: str) -> tuple[list[int], list[bool]]:
    """Ids and, per id, whether it belongs to an answer; bos first where the tokenizer has one."""
    if tokenizer.eos_token_id is None or not tokenizer.is_fast:
        raise ValueError(f"{tokenizer.name_or_path}: the tokenizer must be a fast one that has an eos token")
    ids = [tokenizer.bos_token_id] if tokenizer.bos_token_id is not None else []
    targets = [False] * len(ids)
    run: list[_Piece] = []

    def flush() -> None:
        run_ids, run_targets = _tokenize_run(run, tokenizer, where)
        ids.extend(run_ids)
        targets.extend(run_targets)
        run.clear()

    for piece in pieces:
        if piece.text:
            run.append(piece)
            continue
        flush()
        ids.append(IMAGE_TOKEN_INDEX if piece.text is None else tokenizer.eos_token_id)
        targets.append(piece.target)
    flush()
    return ids, targets


def _tokenize_run(run: list[_Piece], tokenizer: Any, where: str) -> tuple[list[int], list[bool]]:
    if not run:
        return [], []
    text = "".join(piece.text or "" for piece in run)
    encoding = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, split_special_tokens=True)
    ids, offsets = encoding["input_ids"], encoding["offset_mapping"]
    unknown = tokenizer.unk_token_id
    if unknown is not None and unknown in ids:
        start, end = offsets[ids.index(unknown)]
        raise ValueError(
            f"{where}: the tokenizer {tokenizer.name_or_path} does not know {text[start:end]!r}: "
            f"use the one that lies with the data, or prepare the data with this one"
        )
    answers, position = [], 0
    for piece in run:
        position += len(piece.text or "")
        if piece.target:
            answers.append((position - len(piece.text or ""), position))
    overlap = [any(start < stop and end > first for first, stop in answers) for start, end in offsets]
    return ids, overlap
