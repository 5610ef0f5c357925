"""A conversation as token ids, shifted labels and a prompt to generate from.

A conversation is ``[{"from": "human", "value": "<image>\\n..."}, {"from": "gpt", "value": "..."}, ...]``. The
text is tokenized piece by piece between images and control tokens (ends of turns), and a token is a target exactly if
some of its characters belong to an answer; so no answer is searched for in the ids, and no tokenizer's merging of the
character before an answer can shift the mask by one.

The ids are those that ``transformers`` gives to the rendered text as a whole, but for two things: what looks like a
control token inside a question or an answer stays text; and the templates ``llava_v1`` and ``llava_caption`` give what
LLaVA-1.5's own code gives (``llava/train/train.py``: ``preprocess_multimodal``, ``preprocess_v1``,
``preprocess_plain``; ``llava/mm_utils.py``: ``tokenizer_image_token``).
"""

from __future__ import annotations

import re
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import groupby
from typing import Any

from nemo_pre.data.errors import SampleError

IMAGE_TAG = "<image>"
IMAGE_TOKEN_INDEX = -200  # NeVA's placeholder: one id stands for all visual tokens of an image
IGNORE_INDEX = -100
SENTENCEPIECE_SPACE = "▁"  # what SentencePiece writes for a space, and before a text's first word


@dataclass(frozen=True)
class ChatTemplate:
    """``system``, then per turn ``before_question`` question ``before_answer`` [``answer_lead`` answer end], and
    ``between_turns`` where another turn follows.

    What is in brackets is trained on and generated; the end is ``answer_end``, the tokenizer's eos where that is
    empty. ``before_image`` and ``after_image`` are around every image. ``control`` names the special tokens in these
    texts. ``keep_question`` false leaves only the image of a question, as LLaVA does for captions in its first stage.
    ``trim`` takes white space off both ends of questions and answers. ``image_first`` moves the images of a question
    to its front, each followed by a line break, and takes white space off both ends of what is left. ``text_anew``
    tokenizes the text behind an image as if a sequence began there: SentencePiece then puts its word mark before it.
    """

    system: str = ""
    before_question: str = ""
    before_answer: str = ""
    answer_lead: str = ""
    answer_end: str = ""
    between_turns: str = ""
    before_image: str = ""
    after_image: str = ""
    control: tuple[str, ...] = ()
    keep_question: bool = True
    trim: bool = False
    image_first: bool = False
    text_anew: bool = False


VICUNA_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions. "
)
CHATML = ChatTemplate(
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n",
    before_question="<|im_start|>user\n",
    before_answer="<|im_end|>\n<|im_start|>assistant\n",
    answer_end="<|im_end|>",
    between_turns="\n",
    control=("<|im_start|>", "<|im_end|>"),
)
VICUNA = ChatTemplate(VICUNA_SYSTEM, before_question="USER: ", before_answer=" ASSISTANT:", answer_lead=" ")
VISION_START, VISION_END = "<|vision_start|>", "<|vision_end|>"
TEMPLATES = {
    "plain": ChatTemplate(before_answer="\n"),
    "vicuna_v1": VICUNA,
    "llava_v1": replace(VICUNA, image_first=True, text_anew=True),
    "caption": ChatTemplate(keep_question=False),
    "llava_caption": ChatTemplate(keep_question=False, answer_end="\n", text_anew=True),
    "chatml": CHATML,
    "qwen_vl": replace(
        CHATML,
        before_image=VISION_START,
        after_image=VISION_END,
        control=(*CHATML.control, VISION_START, VISION_END),
    ),
    "llama3": ChatTemplate(
        before_question="<|start_header_id|>user<|end_header_id|>\n\n",
        before_answer="<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
        answer_end="<|eot_id|>",
        control=("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
        trim=True,
    ),
}


@dataclass(frozen=True)
class Encoded:
    """``tokens[t]`` predicts ``labels[t]`` (-100: nothing to predict); ``cut`` if the sample was too long."""

    tokens: list[int]
    labels: list[int]
    cut: bool


@dataclass(frozen=True)
class _Piece:
    """Text, or the id of a control token or an image."""

    text: str = ""
    target: bool = False
    token: int | None = None


_IMAGE = _Piece(token=IMAGE_TOKEN_INDEX)


def encode(
    conversation: list[dict[str, str]], tokenizer: Any, template: str, max_tokens: int, num_images: int, where: str
) -> Encoded:
    """Token ids and labels of a whole conversation, at most ``max_tokens`` of them (an image counts as one).

    ``tokenizer`` is a ``transformers`` fast tokenizer; ``where`` names the sample in errors.

    Raises:
        SampleError: turns out of order, or image tags that do not match ``num_images``, or a cut image.
        ValueError: unknown template; a tokenizer that does not know the text.
    """
    layout = _template(template)
    pieces = _render(_turns(conversation, where), layout, tokenizer, answered=True)
    ids, targets = _tokenize(pieces, layout, tokenizer, where)
    if layout.answer_end and layout.answer_end not in layout.control:
        _check_ends(ids, targets, end_of_answer(tokenizer, template), tokenizer, template)
    cut = len(ids) > max_tokens + 1
    ids, targets = ids[: max_tokens + 1], targets[: max_tokens + 1]
    _check_images(pieces, num_images, where)
    if ids[:-1].count(IMAGE_TOKEN_INDEX) < num_images:
        raise SampleError(
            f"{where} is cut to {max_tokens} text tokens before its last image: raise data.sequence_length"
        )
    labels = [token if target else IGNORE_INDEX for token, target in zip(ids, targets, strict=True)]
    return Encoded(ids[:-1], labels[1:], cut)


def encode_prompt(
    conversation: list[dict[str, str]], tokenizer: Any, template: str, num_images: int, where: str
) -> list[int]:
    """Token ids up to where the first answer would start; the conversation may end with the question."""
    layout = _template(template)
    pieces = _render(_turns(conversation, where)[:1], layout, tokenizer, answered=False)
    _check_images(pieces, num_images, where)
    return _tokenize(pieces, layout, tokenizer, where)[0]


def end_of_answer(tokenizer: Any, template: str) -> int:
    """The id at which an answer is over.

    Raises:
        ValueError: unknown template; a tokenizer without its control tokens, or in which the text that ends an answer
            is not a token.
    """
    layout = _template(template)
    if not layout.answer_end:
        return int(tokenizer.eos_token_id)
    if layout.answer_end in layout.control:
        return _control_id(tokenizer, layout.answer_end)
    return _end_of_text(tokenizer, template, layout.answer_end)


@lru_cache(maxsize=8)
def _end_of_text(tokenizer: Any, template: str, end: str) -> int:
    ids = tokenizer("a" + end, add_special_tokens=False)["input_ids"]
    if not ids or tokenizer.decode(ids[-1:]) != end:
        raise ValueError(
            f"data.chat_template={template} ends an answer with {end!r}, which is no token of the tokenizer "
            f"{tokenizer.name_or_path}: choose data.chat_template=caption, which ends it with the eos token"
        )
    return int(ids[-1])


def _check_ends(ids: list[int], targets: list[bool], end: int, tokenizer: Any, template: str) -> None:
    """Every answer's last token must be the one that generation stops at."""
    for token, target, goes_on in zip(ids, targets, [*targets[1:], False], strict=True):
        if target and not goes_on and token != end:
            raise ValueError(
                f"the tokenizer {tokenizer.name_or_path} joins the end of an answer with the text before it "
                f"({tokenizer.decode([token])!r}), so no generation would stop: choose data.chat_template=caption, "
                f"not {template}"
            )


def num_image_tags(message: dict[str, Any]) -> int:
    """How many images a question shows. A message with ``"image_tags": false`` speaks of ``<image>`` and shows none;
    preparation marks such messages."""
    return str(message.get("value", "")).count(IMAGE_TAG) if message.get("image_tags", True) else 0


def _template(name: str) -> ChatTemplate:
    if name not in TEMPLATES:
        raise ValueError(f"data.chat_template={name} is not one of {', '.join(TEMPLATES)}")
    return TEMPLATES[name]


@dataclass(frozen=True)
class _Turn:
    """``tagged``: whether ``<image>`` in the question stands for an image."""

    question: str
    answer: str
    tagged: bool


def _turns(conversation: list[dict[str, str]], where: str) -> list[_Turn]:
    """Questions with their answers; a question without an answer at the end gets an empty one."""
    try:
        messages = [(message["from"], message["value"]) for message in conversation]
    except (KeyError, TypeError) as error:
        raise SampleError(f"{where}: a message needs 'from' and 'value'") from error
    speakers = [speaker for speaker, _ in messages]
    if not messages or speakers != [("human", "gpt")[i % 2] for i in range(len(speakers))]:
        found = ", ".join(map(str, speakers)) or "none"
        raise SampleError(f"{where}: messages must alternate human, gpt; found {found}")
    if any(not isinstance(value, str) for _, value in messages):
        raise SampleError(f"{where}: the value of a message must be text")
    try:
        "".join(value for _, value in messages).encode()
    except UnicodeEncodeError as error:  # half of a surrogate pair, which no tokenizer takes
        raise SampleError(f"{where}: the text of a message has no UTF-8 ({error})") from error
    texts = [value for _, value in messages] + [""] * (len(messages) % 2)
    tagged = [bool(message.get("image_tags", True)) for message in conversation[::2]]
    return [_Turn(*turn) for turn in zip(texts[::2], texts[1::2], tagged, strict=True)]


def _render(turns: list[_Turn], template: ChatTemplate, tokenizer: Any, answered: bool) -> list[_Piece]:
    if tokenizer.eos_token_id is None or not tokenizer.is_fast:
        raise ValueError(f"{tokenizer.name_or_path}: the tokenizer must be a fast one that has an eos token")
    control = {token: _control_id(tokenizer, token) for token in template.control}
    if template.answer_end and template.answer_end not in control:
        end = _Piece(template.answer_end)
    else:
        end = _Piece(token=control[template.answer_end] if template.answer_end else tokenizer.eos_token_id)
    image = [*_literal(template.before_image, control), _IMAGE, *_literal(template.after_image, control)]
    pieces = _literal(template.system, control)
    for number, turn in enumerate(turns):
        answer = turn.answer.strip() if template.trim else turn.answer
        pieces += _literal(template.between_turns * (number > 0) + template.before_question, control)
        pieces += _question(turn, template, image)
        pieces += _literal(template.before_answer, control)
        if answered and (answer or number + 1 < len(turns)):
            trained = bool(answer)  # nobody should learn to say nothing
            pieces += [_Piece(template.answer_lead + answer, target=trained), replace(end, target=trained)]
    return [piece for piece in pieces if piece.text or piece.token is not None]


def _question(turn: _Turn, template: ChatTemplate, image: list[_Piece]) -> list[_Piece]:
    question = turn.question.strip() if template.trim else turn.question
    texts = question.split(IMAGE_TAG) if turn.tagged else [question]
    if not template.keep_question:
        return image * (len(texts) - 1)
    if template.image_first and len(texts) > 1:
        rest = "".join(texts).strip()
        texts = ["", *["\n"] * (len(texts) - 2), "\n" + rest if rest else ""]
    pieces = [_Piece(texts[0])]
    for text in texts[1:]:
        pieces += [*image, _Piece(text)]
    return pieces


def _literal(text: str, control: dict[str, int]) -> list[_Piece]:
    """A template's text, its control tokens taken out."""
    if not control:
        return [_Piece(text)]
    parts = re.split(f"({'|'.join(map(re.escape, control))})", text)
    return [_Piece(token=control[part]) if part in control else _Piece(part) for part in parts]


def _control_id(tokenizer: Any, token: str) -> int:
    number = tokenizer.convert_tokens_to_ids(token)
    if number is None or number == tokenizer.unk_token_id:
        raise ValueError(
            f"the tokenizer {tokenizer.name_or_path} has no token {token}: choose another data.chat_template, or a "
            f"tokenizer that has it"
        )
    return int(number)


def _check_images(pieces: list[_Piece], num_images: int, where: str) -> None:
    tags = sum(piece is _IMAGE for piece in pieces)
    if tags != num_images:
        raise SampleError(
            f"{where} has {num_images} image(s) and {tags} {IMAGE_TAG} tag(s) in its questions: "
            f"give each image one tag"
        )


def _tokenize(
    pieces: list[_Piece], template: ChatTemplate, tokenizer: Any, where: str
) -> tuple[list[int], list[bool]]:
    """Ids and, per id, whether it belongs to an answer; bos first where the tokenizer has one, once."""
    has_bos = tokenizer.bos_token_id is not None and not begins_with_bos(template, tokenizer)
    ids = [tokenizer.bos_token_id] if has_bos else []
    targets = [False] * len(ids)
    begins = True  # whether a text at this place is tokenized as the beginning of a sequence
    for is_text, group in groupby(pieces, key=lambda piece: piece.token is None):
        run = list(group)
        if is_text:
            if begins and template.text_anew and marks_first_text_only(tokenizer):
                # Before white space too, as SentencePiece itself does.
                run = [_Piece(SENTENCEPIECE_SPACE, target=run[0].target), *run]
                begins = False
            run_ids, run_targets = _tokenize_run(run, tokenizer if begins else _inside(tokenizer), where)
        else:
            run_ids = [piece.token for piece in run if piece.token is not None]
            run_targets = [piece.target for piece in run]
        begins = template.text_anew and run[-1] is _IMAGE
        ids += run_ids
        targets += run_targets
    return ids, targets


def begins_with_bos(template: ChatTemplate, tokenizer: Any) -> bool:
    """Whether the template's first words are the tokenizer's bos, as chatml's are for SmolLM2."""
    begins = template.system or template.before_question
    return bool(tokenizer.bos_token in template.control and begins.startswith(tokenizer.bos_token))


def marks_first_text_only(tokenizer: Any) -> bool:
    """Whether SentencePiece's word mark goes before the first text of a sequence and not before a text that follows a
    control token or an image: Llama's tokenizers with ``legacy`` false."""
    from tokenizers.pre_tokenizers import Metaspace

    mark = tokenizer.backend_tokenizer.pre_tokenizer
    return isinstance(mark, Metaspace) and mark.prepend_scheme == "first"


@lru_cache(maxsize=8)
def _inside(tokenizer: Any) -> Any:
    """The tokenizer for a text that does not begin its sequence.

    SentencePiece's word mark, which Llama's newer tokenizers put before the first word of a sequence, is not for a
    text that follows a control token or an image. (Older ones put it there too, by a normalizer; theirs is kept.)
    """
    from tokenizers.pre_tokenizers import Metaspace

    if not marks_first_text_only(tokenizer):
        return tokenizer
    tokenizer = deepcopy(tokenizer)
    mark = tokenizer.backend_tokenizer.pre_tokenizer
    tokenizer.backend_tokenizer.pre_tokenizer = Metaspace(mark.replacement, prepend_scheme="never", split=mark.split)
    return tokenizer


def _tokenize_run(run: list[_Piece], tokenizer: Any, where: str) -> tuple[list[int], list[bool]]:
    text = "".join(piece.text for piece in run)
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
        position += len(piece.text)
        if piece.target:
            answers.append((position - len(piece.text), position))
    overlap = [any(start < stop and end > first for first, stop in answers) for start, end in offsets]
    return ids, overlap
