"""The steps of the first contact, in the order of what matters, with the seconds each may take."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.gpu.first_contact.harness import Step


@dataclass(frozen=True)
class Contact:
    """A step, and the function that does it.

    Attributes:
        does: ``module:function`` of this package; called with the record and the arguments.
        imports: what its process imports before its turn.
        limit, least: seconds, as of the harness's steps.
    """

    name: str
    what: str
    does: str
    limit: float
    least: float
    imports: Sequence[str] = ()
    arguments: Sequence[str] = ()


MEGATRON = ("torch", "nemo_pre.neva.build", "megatron.core.transformer.transformer_block")
FP8 = ("delayed", "tensorwise", "blockwise")
CONTACTS = (
    Contact("machine", "versions and what the machine has", "machine:versions", 30, 3, ("torch",)),
    Contact("imports", "what can be imported, each in a process of its own", "machine:imports", 75, 20),
    Contact("te", "Transformer Engine computes, in bf16 and in FP8", "kernels:transformer_engine", 45, 10, ("torch",)),
    Contact("losses", "PRe's and LaVer's losses against the CPU", "kernels:losses", 40, 10, ("nemo_pre.losses",)),
    Contact(
        "attention",
        "dense, split and FlexAttention against the CPU",
        "kernels:attention",
        90,
        20,
        ("nemo_pre.neva.mixed_attention",),
    ),
    Contact("digits", "digits_tiny, 5 steps with PRe and with LaVer, against the CPU", "runs:digits", 100, 30),
    Contact("layer_bf16", "one layer of Qwen2.5-7B's width in bf16 against float32", "layer:bf16", 45, 15, MEGATRON),
    *(
        Contact(f"layer_{recipe}", f"the same in FP8, {recipe}", "layer:fp8", 45, 15, MEGATRON, (recipe,))
        for recipe in FP8
    ),
    Contact(
        "flex",
        "FlexAttention at 2,048 tokens against dense and causal",
        "kernels:flex",
        60,
        20,
        ("nemo_pre.neva.build",),
    ),
    Contact("pre_step", "PRe's step beside plain NeVA's, 7B width, 4 layers", "runs:pre_step", 90, 40),
    Contact("laver_step", "LaVer's beside mixed attention's, the same", "runs:laver_step", 90, 40),
    Contact("memory", "peak memory against the plan and the rehearsal", "memory:peaks", 90, 40),
    Contact("teacher", "the teacher's update against a copy", "memory:teacher", 40, 10, ("torch",)),
    Contact("bridge", "Megatron-Bridge's first contact", "machine:bridge", 60, 10),
)
BY_NAME = {contact.name: contact for contact in CONTACTS}


def check(names: Sequence[str]) -> None:
    """Refuse a name that is no step's.

    Raises:
        ValueError: one sentence that names it.
    """
    for name in names:
        if name not in BY_NAME:
            raise ValueError(f"{name} is no step: choose from {', '.join(BY_NAME)}.")


def steps(names: Sequence[str], results: Path, on_cpu: bool) -> list[Step]:
    """The harness's steps, all where none is named. A CPU is slower: ten times as long may each take there."""
    where = "cpu" if on_cpu else "gpu"
    return [
        Step(
            each.name,
            each.what,
            [sys.executable, "-m", "benchmarks.gpu.first_contact.step", each.name, str(results), where],
            each.limit * (10 if on_cpu else 1),
            each.least,
            gated=True,
        )
        for each in CONTACTS
        if not names or each.name in names
    ]
