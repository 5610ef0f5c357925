"""Turning a candidate into the members of a tar sample: what is wrong with it is found here.

Reasons to drop a sample: ``broken_record``, ``wrong_turn_order``, ``empty_answer``, ``image_tags`` (another number of
``<image>`` tags in the questions than of images), ``missing_image``, ``path_outside_root``, ``undecodable_image``,
``too_many_pixels`` and ``bad_mask``.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from typing import Any

from data_prep.prepare.candidate import BadSample, Candidate
from data_prep.prepare.images import Picture, checked_mask, checked_picture
from data_prep.prepare.plan import Options
from data_prep.prepare.repairs import repaired
from nemo_pre.data.conversation import IMAGE_TAG, num_image_tags


@dataclass(frozen=True)
class CheckedSample:
    members: dict[str, bytes]
    text_chars: int  # of the messages, without image tags
    image_sizes: list[list[int]]  # [width, height] of each
    repaired: tuple[str, ...] = ()  # by which of the repairs


def checked_sample(candidate: Candidate, source: str, options: Options) -> CheckedSample:
    """``source`` names the dataset and the row within it. Raises BadSample."""
    candidate = replace(candidate, conversations=_checked_messages(candidate.conversations))
    done = repaired(candidate, options.repair)
    candidate = done.candidate
    _check_turns(candidate)
    pictures = []
    for number, name in enumerate(candidate.images):
        pictures.append(checked_picture(candidate.load(number), name, options))
    record: dict[str, Any] = {"id": candidate.id, "source": source}
    if len(pictures) == 1:
        record["image"] = candidate.images[0]
    elif pictures:
        record["images"] = candidate.images
    if done.names:
        record["repaired"] = list(done.names)
    record["conversations"] = candidate.conversations
    members = {"json": json.dumps(record, separators=(",", ":")).encode(), **_image_members(pictures)}
    if candidate.mask is not None:
        members["mask.png"] = checked_mask(candidate.mask(), pictures[0], options)
    text_chars = sum(len(turn["value"].replace(IMAGE_TAG, "")) for turn in candidate.conversations)
    return CheckedSample(members, text_chars, [list(picture.size) for picture in pictures], done.names)


def _image_members(pictures: list[Picture]) -> dict[str, bytes]:
    if len(pictures) == 1:
        return {pictures[0].extension: pictures[0].content}
    return {f"{number}.{picture.extension}": picture.content for number, picture in enumerate(pictures)}


def _checked_messages(turns: Any) -> list[dict[str, Any]]:
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise BadSample("broken_record", "it has no list of conversations")
    if not all(isinstance(turn.get("from"), str) and isinstance(turn.get("value"), str) for turn in turns):
        raise BadSample("broken_record", "a message needs 'from' and 'value'")
    try:
        "".join(turn["value"] for turn in turns).encode()
    except UnicodeEncodeError as error:
        raise BadSample("broken_record", f"its text is not Unicode ({error.reason})") from error
    return [{"from": turn["from"], "value": turn["value"]} for turn in turns]


def _check_turns(candidate: Candidate) -> None:
    turns = candidate.conversations
    speakers = [turn["from"] for turn in turns]
    alternate = speakers == [("human", "gpt")[number % 2] for number in range(len(speakers))]
    if not speakers or not alternate or (candidate.answered and len(speakers) % 2):
        raise BadSample("wrong_turn_order", ", ".join(speakers[:20]) or "no turns")
    for turn in turns[1::2]:
        if not turn["value"].strip():
            raise BadSample("empty_answer", "an answer is empty")
        if num_image_tags(turn):
            raise BadSample("image_tags", f"an answer holds {IMAGE_TAG}")
    tags = sum(map(num_image_tags, turns))
    if tags != len(candidate.images):
        raise BadSample("image_tags", f"{tags} {IMAGE_TAG} tag(s) and {len(candidate.images)} image(s)")
