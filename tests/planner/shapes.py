"""Configurations that the planner's tests ask about: a tiny one that is built, and large ones that are counted."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Any

from nemo_pre.config.run import RunConfig
from nemo_pre.config.schema import LanguageConfig

LAVER = {"mask_schedule": "constant", "mask_ratio": 0.5, "head_hidden_width": 24}
MIXED = {"attention": "mixed", "rope": "2d"}


def tiny(changes: dict[str, Any] | None = None, micro_batches: int = 1, length: int = 64, **parts: Any) -> RunConfig:
    """The parity tests' model on rows of ``length`` tokens; ``changes`` are dotted options."""
    from tests.parity.shape import tiny_run

    run = tiny_run(
        output_dir=os.devnull,
        parallel=parts.pop("parallel", {}),
        pre=parts.pop("pre", None),
        num_microbatches=micro_batches,
        micro_batch_size=2,
        max_steps=2,
        **parts,
    )
    run.data.sequence_length = length
    for name, value in (changes or {}).items():
        *path, last = name.split(".")
        part: Any = run
        for step in path:
            part = getattr(part, step)
        assert hasattr(part, last), name
        setattr(part, last, value)
    return run


def llama3_70b(**parallel: Any) -> RunConfig:
    """LLaVA-1.5's second stage with a Llama-3-70B decoder."""
    return _with_language(
        LanguageConfig(
            family="llama",
            num_layers=80,
            hidden_size=8192,
            ffn_hidden_size=28672,
            num_attention_heads=64,
            num_query_groups=8,
            vocab_size=128256,
            rotary_base=500000.0,
        ),
        parallel,
    )


def qwen25_72b(**parallel: Any) -> RunConfig:
    """LLaVA-1.5's second stage with a Qwen2.5-72B decoder."""
    return _with_language(
        LanguageConfig(
            family="qwen2",
            num_layers=80,
            hidden_size=8192,
            ffn_hidden_size=29568,
            num_attention_heads=64,
            num_query_groups=8,
            vocab_size=152064,
            rotary_base=1000000.0,
            layernorm_epsilon=1e-6,
        ),
        parallel,
    )


def _with_language(language: LanguageConfig, parallel: dict[str, Any]) -> RunConfig:
    from nemo_pre.config.compose import compose_run

    run = compose_run(["experiment=llava15_7b_stage2_full"])
    run.model.language = language
    layout = {"tensor": 8, "pipeline": 8, "data": 8, "sequence": True, **parallel}
    run.parallel = replace(run.parallel, **layout)
    run.trainer.global_batch_size, run.trainer.micro_batch_size = 1024, 1
    return run
