"""What becomes of every option when a run continues with another value of it: the one place that says so.

:mod:`nemo_pre.run_files.continuing` acts on it and prints it, and the table of docs/training.md is made of it:

    python -m nemo_pre.config.on_resume docs/training.md

An objective says it of its own options (``on_resume`` of :class:`nemo_pre.objectives.objective.Objective`).
"""

from __future__ import annotations

import sys
from fractions import Fraction
from pathlib import Path
from typing import Any

from nemo_pre.config.help import run_options
from nemo_pre.objectives.registry import known
from nemo_pre.options import REFUSED, OnResume, applied, kept, refused

BEGIN, END = "<!-- made by nemo_pre.config.on_resume: begin -->\n", "<!-- end -->\n"


def _another_stream(before: Any, now: Any, config: Any) -> bool:
    """Whether the samples to come would be others than those the run counts, which it has not been told to accept."""
    return config.data.on_state_mismatch != "restart"


def _another_packed_stream(before: Any, now: Any, config: Any) -> bool:
    return config.data.packing and _another_stream(before, now, config)


def _another_blend(before: Any, now: Any, config: Any) -> bool:
    return _proportions(before) != _proportions(now) and _another_stream(before, now, config)


def _proportions(blend: Any) -> list[Fraction] | None:
    if not blend:
        return None
    weights = [Fraction(str(source["weight"])) for source in blend]
    return [weight / sum(weights) for weight in weights]


_NEXT_STEP = applied("from the next step on")
_LABEL = applied("a name, or where something lies")
_THIS_START = applied("of this start alone")
_MACHINE = applied("where and how the run runs; its numbers stay")
_RECORD = applied("from now on; what is on record stays")
_SAMPLES = applied("for samples that are read from now on")
_WEIGHTS = refused("the checkpoint's weights belong to another model", weights_go_on=False)
_READING = refused("the weights were trained with the former value")
_WITHOUT_RESTART = "without data.on_state_mismatch=restart"
_OTHER_SAMPLES = "the samples to come would not follow on those trained on"
_STREAM = applied(
    "with data.on_state_mismatch=restart: the data begins anew",
    _another_stream,
    _WITHOUT_RESTART,
    _OTHER_SAMPLES,
)
_PACKED_STREAM = applied(
    _SAMPLES.words,
    _another_packed_stream,
    f"with data.packing and {_WITHOUT_RESTART}",
    "the samples would be packed into other rows",
)
_FREEZING = refused("the checkpoint has optimizer states of what was trained alone (a rate of 0 stops a module too)")

RULES: dict[str, OnResume] = {
    **dict.fromkeys(("name", "experiment", "output_dir"), _LABEL),
    "seed": applied("for what is drawn from the next step on; weights and data are the checkpoint's"),
    "platform": _MACHINE,
    "dry_run": _THIS_START,
    **dict.fromkeys(("init_from", "vision_from"), kept("the run has weights of its own")),
    "resume": applied("of this start alone; false is refused where the run has checkpoints"),
    # the model
    **dict.fromkeys(("model.name", "model.tokenizer"), _LABEL),
    **dict.fromkeys(
        (
            *(f"model.vision.{each}" for each in ("family", "image_size", "patch_size", "hidden_size")),
            *(f"model.vision.{each}" for each in ("intermediate_size", "num_layers", "num_attention_heads")),
            *(f"model.vision.{each}" for each in ("window_size", "full_attention_layers", "pooling_head")),
            *(f"model.language.{each}" for each in ("family", "num_layers", "hidden_size", "ffn_hidden_size")),
            *(f"model.language.{each}" for each in ("num_attention_heads", "num_query_groups", "vocab_size")),
            *(f"model.language.{each}" for each in ("rotary_base", "layernorm_epsilon", "tie_embeddings")),
            *(f"model.language.rope_scaling.{each}" for each in ("kind", "factor", "low_freq_factor")),
            *(f"model.language.rope_scaling.{each}" for each in ("high_freq_factor", "original_positions")),
            "model.projector",
        ),
        _WEIGHTS,
    ),
    **dict.fromkeys(
        (
            *(f"model.vision.{each}" for each in ("feature_layer", "drop_class_token", "image_mean", "image_std")),
            *("model.attention", "model.rope", "model.rope_sections"),
        ),
        _READING,
    ),
    **dict.fromkeys(("model.vision.min_visual_tokens", "model.vision.max_visual_tokens"), _PACKED_STREAM),
    "model.language.max_position_embeddings": applied("for models exported from now on"),
    "model.language.init_std": kept("the weights are there already"),
    "model.attention_backend": _MACHINE,
    # the data
    **dict.fromkeys(("data.name", "data.features"), _LABEL),
    "data.path": applied("a name, or where something lies; other samples there are refused, as data.blend is"),
    "data.blend": applied(
        "another place of the same samples, or with data.on_state_mismatch=restart: the data begins anew",
        _another_blend,
        f"in other proportions {_WITHOUT_RESTART}",
        _OTHER_SAMPLES,
    ),
    **dict.fromkeys(("data.shuffle_seed", "data.packing"), _STREAM),
    **dict.fromkeys(("data.sequence_length", "data.chat_template", "data.packing_window"), _PACKED_STREAM),
    **dict.fromkeys(
        ("data.image_resize", "data.image_filter", "data.image_crop_from", "data.max_tiles", "data.on_error"), _SAMPLES
    ),
    "data.num_workers": _MACHINE,
    "data.record_samples": _RECORD,
    "data.on_state_mismatch": _THIS_START,
    # layout and precision
    **dict.fromkeys(
        (
            *(f"parallel.{each}" for each in ("tensor", "pipeline", "virtual_pipeline", "pipeline_layers", "context")),
            *(f"parallel.{each}" for each in ("sequence", "data", "overlap_grad_reduce", "recompute")),
            *("parallel.recompute_num_layers", "parallel.labelled_output"),
        ),
        _MACHINE,
    ),
    "parallel.distributed_optimizer": refused("the two optimizers' states are written in different forms"),
    **dict.fromkeys(
        ("precision.name", "precision.amax_history", "precision.bf16_layers"),
        refused("weights and optimizer states are kept in the checkpoint's precision"),
    ),
    # the optimizer
    **dict.fromkeys(
        (
            *("optim.lr", "optim.lr_vision", "optim.lr_projector", "optim.lr_language", "optim.lr_heads"),
            *("optim.min_lr_ratio", "optim.weight_decay", "optim.beta1", "optim.beta2", "optim.eps"),
            *("optim.clip_grad", "objective.lm_weight"),
        ),
        _NEXT_STEP,
    ),
    "optim.warmup_ratio": applied(
        "from the next step on, as if the run had begun with it; a step behind the warm-up is not warmed up again"
    ),
    **dict.fromkeys(("optim.freeze_vision", "optim.freeze_projector", "optim.freeze_language"), _FREEZING),
    "objective.name": _LABEL,
    # the trainer
    "trainer.max_steps": applied(
        "all schedules have the new length, as if the run had begun with it; less than the run's step is refused"
    ),
    "trainer.global_batch_size": applied(
        "from the next step on; the data goes on at the next sample, and steps and schedules count on by one a step"
    ),
    "trainer.micro_batch_size": _MACHINE,
    **dict.fromkeys(
        (
            *(f"trainer.{each}" for each in ("log_every", "log_grad_norms_every", "log_similarity_every")),
            *(f"trainer.{each}" for each in ("log_diagnostics_every", "wandb_project", "val_every", "val_samples")),
            *("trainer.checkpoint_every", "trainer.keep_checkpoints"),
        ),
        _RECORD,
    ),
    **dict.fromkeys(
        (
            *("trainer.async_checkpoint", "trainer.ignore_memory_estimate", "trainer.rank_timeout"),
            "trainer.hang_timeout",
        ),
        _MACHINE,
    ),
    **dict.fromkeys(
        (
            *(f"trainer.{each}" for each in ("nan_action", "spike_action", "spike_factor", "spike_window")),
            "trainer.max_roll_backs",
        ),
        _NEXT_STEP,
    ),
    # the site
    **dict.fromkeys(
        (
            *(f"cluster.{each}" for each in ("name", "nodes", "devices_per_node", "partition", "account", "qos")),
            *(
                f"cluster.{each}"
                for each in ("time_limit", "warning_seconds", "cpus_per_task", "memory_per_node", "gpu")
            ),
            *(
                f"cluster.{each}"
                for each in ("gpu_memory_gb", "exclude", "sbatch_options", "container_image", "container_mounts")
            ),
            *(f"cluster.{each}" for each in ("python", "environment", "setup", "ft_restarts", "max_failures")),
            *(f"cluster.{each}" for each in ("health_check", "all_reduce_check", "min_free_gb", "min_write_mb_s")),
        ),
        _MACHINE,
    ),
}


def rule_of(option: str) -> OnResume | None:
    """What becomes of the option with this full name; None where nothing says so."""
    part, _, rest = option.partition(".")
    name, _, field = rest.partition(".")
    if part == "objective" and name in known():
        return known()[name].rule_on_resume(field)
    return RULES.get(option)


def table() -> str:
    """The options of a run and what becomes of each, as a table in Markdown: a row for those that share it."""
    rows: dict[OnResume, list[str]] = {}
    for option in run_options():
        if "[0]" not in option.name:  # of the list that stands before it
            rule = rule_of(option.name)
            assert rule is not None, f"nothing says what becomes of {option.name} on resume"
            rows.setdefault(rule, []).append(option.name)
    lines = [f"| {_names(names)} | {rule.does} | {_words(rule)} |" for rule, names in rows.items()]
    return "\n".join(["| option | another value is | |", "|---|---|---|", *lines]) + "\n"


def _words(rule: OnResume) -> str:
    new_run = "; a new run may start from the weights" if rule.does == REFUSED and rule.weights_go_on else ""
    return f"{rule.words}{new_run}" + (f"; **refused** {rule.where}: {rule.why}" if rule.refuses else "")


def _names(names: list[str]) -> str:
    """Options by their part: ``optim.lr``, ``lr_vision``."""
    shown, former = [], None
    for name in names:
        part, _, last = name.rpartition(".")
        shown.append(f"`{last if part and part == former else name}`")
        former = part
    return ", ".join(shown)


def with_table(page: str) -> str:
    """A page of the manual with the table between its marks as it is now."""
    before, _, rest = page.partition(BEGIN)
    _, _, behind = rest.partition(END)
    return before + BEGIN + table() + END + behind


if __name__ == "__main__":
    file = Path(sys.argv[1])
    file.write_text(with_table(file.read_text()))
