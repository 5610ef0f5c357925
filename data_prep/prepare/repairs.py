"""Repairs of conversations that would be dropped: each has a name, is done where it is asked for, and is counted.

LLaVA-1.5's loader (``llava/train/train.py``) takes what ``llava`` names, in the way that is said here but for an empty
answer: there it runs the question into the next one, without the end of a turn between them.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

from data_prep.prepare.candidate import Candidate
from nemo_pre.data.conversation import IMAGE_TAG

REPAIRS = {
    "first_answer": "an answer before the first question is left out",
    "empty_answer": "a question with an empty answer is left out, if others stay; its image goes to the next one",
    "repeated_tag": "a question that repeats <image> for its one image shows it once",
    "unseen_image": "images that no question shows are left out, and the text stays",
    "untagged_image": "images that no question shows go before the first one",
    "text_tag": "<image> in an answer, or in a sample without an image, is text",
}
GROUPS = {"llava": ("first_answer", "empty_answer", "repeated_tag", "unseen_image", "text_tag")}


def chosen_repairs(names: str | Iterable[str] | None) -> tuple[str, ...]:
    """The repairs that an option names, one by one or as a group, in their order.

    Raises:
        ValueError: an unknown name, or two that contradict each other.
    """
    if names is None:
        return ()
    names = [name.strip() for name in names.strip("[]").split(",")] if isinstance(names, str) else list(names)
    unknown = [str(name) for name in names if name not in REPAIRS and name not in GROUPS]
    if unknown:
        raise ValueError(f"repair={unknown[0]} is not one of {', '.join([*GROUPS, *REPAIRS])}")
    chosen = {repair for name in names for repair in GROUPS.get(name, (name,))}
    if chosen >= {"unseen_image", "untagged_image"}:
        raise ValueError("repair has unseen_image and untagged_image, which contradict each other: leave one out")
    return tuple(name for name in REPAIRS if name in chosen)


@dataclass(frozen=True)
class Repaired:
    """A candidate after its repairs, and the names of those that it needed."""

    candidate: Candidate
    names: tuple[str, ...]


def repaired(candidate: Candidate, repairs: tuple[str, ...]) -> Repaired:
    """``candidate`` with what ``repairs`` allow; its turns are messages with 'from' and 'value'. What stays wrong is
    found by the checks after it."""
    done = []
    for name in repairs:
        changed = _DOERS[name](candidate)
        if changed is not None:
            candidate = changed
            done.append(name)
    return Repaired(candidate, tuple(done))


def _first_answer(candidate: Candidate) -> Candidate | None:
    turns = candidate.conversations
    if len(turns) < 2 or turns[0]["from"] != "gpt":
        return None
    return replace(candidate, conversations=turns[1:])


def _empty_answer(candidate: Candidate) -> Candidate | None:
    turns = candidate.conversations
    if [turn["from"] for turn in turns] != ["human", "gpt"] * (len(turns) // 2):
        return None
    kept: list[dict[str, Any]] = []
    tags = 0  # of questions that were left out, and whose image the next one gets
    for question, answer in zip(turns[::2], turns[1::2], strict=True):
        if not answer["value"].strip():
            tags += question["value"].count(IMAGE_TAG)
            continue
        kept += [{**question, "value": f"{IMAGE_TAG}\n" * tags + question["value"]}, answer]
        tags = 0
    if not kept or len(kept) == len(turns) or tags:
        return None
    return replace(candidate, conversations=kept)


def _repeated_tag(candidate: Candidate) -> Candidate | None:
    questions = candidate.conversations[::2]
    counts = [turn["value"].count(IMAGE_TAG) for turn in questions]
    images = len(candidate.images)
    if sum(counts) == images or sum(map(bool, counts)) != images:
        return None
    turns = list(candidate.conversations)
    for number, turn in enumerate(questions):
        first, *others = turn["value"].split(IMAGE_TAG)
        turns[2 * number] = {**turn, "value": first + (IMAGE_TAG + "".join(others) if others else "")}
    return replace(candidate, conversations=turns)


def _shows_none_of_its_images(candidate: Candidate) -> bool:
    tags = sum(turn["value"].count(IMAGE_TAG) for turn in candidate.conversations)
    return bool(candidate.images) and not tags and candidate.mask is None and bool(candidate.conversations)


def _unseen_image(candidate: Candidate) -> Candidate | None:
    return replace(candidate, images=[]) if _shows_none_of_its_images(candidate) else None


def _untagged_image(candidate: Candidate) -> Candidate | None:
    if not _shows_none_of_its_images(candidate):
        return None
    first, *others = candidate.conversations
    value = f"{IMAGE_TAG}\n" * len(candidate.images) + first["value"]
    return replace(candidate, conversations=[{**first, "value": value}, *others])


def _text_tag(candidate: Candidate) -> Candidate | None:
    """Questions are marked for the reader, to which an answer's tag is text in any case."""
    turns, texts = [], 0
    for turn in candidate.conversations:
        is_text = IMAGE_TAG in turn["value"] and (turn["from"] == "gpt" or not candidate.images)
        texts += is_text
        turns.append({**turn, "image_tags": False} if is_text else turn)
    return replace(candidate, conversations=turns) if texts else None


_DOERS = {
    "first_answer": _first_answer,
    "empty_answer": _empty_answer,
    "repeated_tag": _repeated_tag,
    "unseen_image": _unseen_image,
    "untagged_image": _untagged_image,
    "text_tag": _text_tag,
}


def offered(reasons: Iterable[str]) -> list[str]:
    """The repairs that may keep samples dropped for ``reasons``."""
    may = {
        "wrong_turn_order": ["first_answer"],
        "empty_answer": ["empty_answer"],
        "image_tags": ["repeated_tag", "unseen_image", "untagged_image", "text_tag"],
    }
    wanted = {repair for reason in reasons for repair in may.get(reason, [])}
    return [name for name in REPAIRS if name in wanted]
