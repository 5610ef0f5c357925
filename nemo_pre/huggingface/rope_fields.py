"""Rotary positions as a ``config.json`` says them: transformers 4's ``rope_theta`` and ``rope_scaling``, transformers
5's ``rope_parameters``, which holds both, or all of them, where they agree."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from nemo_pre.config.schema import RopeScalingConfig
from nemo_pre.huggingface.config_fields import (
    COUNT,
    INDICES,
    POSITIVE,
    REQUIRED,
    WORD,
    Field,
    Irrelevant,
    Only,
    Read,
    Table,
    read_fields,
    short,
)

_NO_EFFECT = Irrelevant("has no effect on this type")
_ANY: dict[str, Field] = {
    "rope_type": Read(WORD, None),
    "type": Read(WORD, None),
    "rope_theta": Read(POSITIVE.or_null, None),
    "mrope_section": Read(INDICES.or_null, None),
    "mrope_interleaved": Only(False),
    "partial_rotary_factor": Only(1.0, also=(None,)),
    "attention_factor": Only(None),
}
TYPES: dict[str, Table] = {
    "default": {**_ANY, "factor": Only(1.0), "original_max_position_embeddings": _NO_EFFECT},
    "linear": {**_ANY, "factor": Read(POSITIVE, REQUIRED), "original_max_position_embeddings": _NO_EFFECT},
    "llama3": {
        **_ANY,
        "factor": Read(POSITIVE, REQUIRED),
        "low_freq_factor": Read(POSITIVE, REQUIRED),
        "high_freq_factor": Read(POSITIVE, REQUIRED),
        "original_max_position_embeddings": Read(COUNT, REQUIRED),
    },
}
TYPES["mrope"] = TYPES["default"]


@dataclass(frozen=True)
class Rope:
    """Rotary positions.

    Attributes:
        base: "theta"; None: not said.
        scaling: how frequencies are slowed down.
        sections: frequencies of time, row and column; None: there is one axis.
    """

    base: float | None
    scaling: RopeScalingConfig
    sections: list[int] | None = None


def read_rope(text: dict[str, Any], default_base: float, where: str, mrope: bool = False) -> Rope:
    """The positions of a text model.

    Args:
        text: its fields as they were read.
        default_base: what ``transformers`` takes where the file says nothing at all.
        mrope: it is a Qwen2.5-VL's, whose positions have three axes and no scaling.

    Raises:
        ValueError: a type or a value that our layers do not compute, or two spellings that contradict each other.
    """
    said = []
    if text["rope_parameters"] is not None:
        said.append(_read(text["rope_parameters"], where, "rope_parameters", mrope))
        if said[0].base is None and text["rope_theta"] is None:
            raise ValueError(f"{where} has rope_parameters without rope_theta: it must be a number above 0.")
    if text["rope_scaling"] is not None:
        said.append(_read(text["rope_scaling"], where, "rope_scaling", mrope))
    bases = {float(base) for base in (text["rope_theta"], *(rope.base for rope in said)) if base is not None}
    if len(bases) > 1 or len({(str(rope.scaling), str(rope.sections)) for rope in said}) > 1:
        raise ValueError(
            f"{where} has rope_parameters={text['rope_parameters']}, but rope_theta={text['rope_theta']} and "
            f"rope_scaling={text['rope_scaling']}, which say something else: remove what is wrong."
        )
    rope = said[0] if said else Rope(None, RopeScalingConfig())
    return Rope(bases.pop() if bases else default_base, rope.scaling, rope.sections)


def _read(values: dict[str, Any], where: str, name: str, mrope: bool) -> Rope:
    kind = _type(values, where, name)
    if kind not in (("default", "mrope") if mrope else ("default", "linear", "llama3")):
        taken = "type=mrope with mrope_section is" if mrope else "linear and llama3 are"
        raise ValueError(f"{where} has {name} of type {short(kind)}: only {taken} imported.")
    found = read_fields(values, TYPES[kind], f"{where}: {name}")
    scaling = RopeScalingConfig()
    if kind == "linear":
        scaling = RopeScalingConfig(kind="linear", factor=float(found["factor"]))
    if kind == "llama3":
        scaling = RopeScalingConfig(
            kind="llama3",
            factor=float(found["factor"]),
            low_freq_factor=float(found["low_freq_factor"]),
            high_freq_factor=float(found["high_freq_factor"]),
            original_positions=found["original_max_position_embeddings"],
        )
        if scaling.low_freq_factor >= scaling.high_freq_factor:
            raise ValueError(
                f"{where} has {name} with low_freq_factor={scaling.low_freq_factor}: it must be below "
                f"high_freq_factor={scaling.high_freq_factor}."
            )
    if kind == "mrope" and found["mrope_section"] is None:
        raise ValueError(f"{where} has {name} of type mrope without mrope_section, which must be a list.")
    return Rope(found["rope_theta"], scaling, found["mrope_section"])


def _type(values: dict[str, Any], where: str, name: str) -> str:
    """The type under either name; M-RoPE is called ``default`` beside its sections too."""
    words: dict[str, Field] = {key: _ANY[key] for key in ("rope_type", "type") if key in values}
    said = set(read_fields({key: values[key] for key in words}, words, f"{where}: {name}").values()) or {"default"}
    if said == {"mrope", "default"}:
        said = {"mrope"}
    if len(said) > 1:
        raise ValueError(f"{where} has {name} of types {short(' and '.join(sorted(said)))}: remove what is wrong.")
    return said.pop()
