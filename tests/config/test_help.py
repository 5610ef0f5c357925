"""``nemo-pre train --help PART`` says of every option what it is for and what it may hold, with no list of its own."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from typing import Any

import pytest

from nemo_pre import cli
from nemo_pre.config.help import RUN, field_comments, parts, run_options
from nemo_pre.config.run import RunConfig
from nemo_pre.config.schema import BlendSource, DataConfig, TrainerConfig, VisionConfig
from nemo_pre.objectives.pre import PReConfig
from nemo_pre.options import RULE


def fields_of(values: Any, prefix: str = "") -> Iterator[tuple[str, dataclasses.Field[Any]]]:
    """Every option with its full name, found by walking over an instance."""
    for field in dataclasses.fields(values):
        value = getattr(values, field.name)
        if dataclasses.is_dataclass(value):
            yield from fields_of(value, f"{prefix}{field.name}.")
        else:
            yield prefix + field.name, field


def asked(capsys: pytest.CaptureFixture[str], *parts: str) -> dict[str, str]:
    """What the command line says, on one line, by option."""
    assert cli.main(["train", "--help", *parts]) == 0
    blocks = re.split(r"\n(?=  \S)", capsys.readouterr().out)
    return {block.partition("=")[0].strip(): " ".join(block.split()) for block in blocks}


def test_every_option_of_a_run_is_shown_with_all_that_it_may_hold(capsys):
    options = dict([*fields_of(RunConfig()), *fields_of(BlendSource(), "data.blend[0].")])
    shown = asked(capsys, RUN, *(name for name in parts() if "." not in name and name != RUN))
    assert not options.keys() - shown.keys()
    with_rule = {name: field.metadata[RULE] for name, field in options.items() if RULE in field.metadata}
    assert len(with_rule) > 80
    for name, rule in with_rule.items():
        for word, meaning in (rule.choices or {rule.help: ""}).items():
            assert word in shown[name] and meaning in shown[name], name


def test_an_option_is_shown_with_type_default_purpose_and_rule(capsys):
    shown = asked(capsys, "trainer", "objective.pre")
    assert shown["trainer.max_steps"] == "trainer.max_steps= int, needed optimizer steps must be 1 or more"
    assert shown["objective.pre.variant"] == (
        "objective.pre.variant=patch str patch (every visual token) | global (mean-pooled per image)"
    )
    assert "steps; null: at the end only" in shown["trainer.val_every"]
    assert "parallel.data" in asked(capsys, "parallel.data")
    assert "parallel.tensor" not in asked(capsys, "parallel.data")


def test_every_option_says_what_it_is_for_or_what_it_may_hold():
    assert [
        option.name for option in run_options() if not option.comment and not (option.rule and option.rule.help)
    ] == []


def test_an_unknown_part_is_refused_with_the_known_ones(capsys):
    assert cli.main(["train", "--help", "objective.lever"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "'objective.lever' is no part" in error
    assert all(name in error for name in ("run", "model.vision", "objective.laver", "trainer"))


def test_an_override_beside_help_leaves_the_general_help(capsys):
    assert cli.main(["train", "experiment=digits_tiny", "--help"]) == 0
    text = capsys.readouterr().out
    assert "groups and their choices" in text and "nemo-pre train --help trainer" in text


def test_comments_are_read_behind_within_and_above_a_field():
    assert field_comments(TrainerConfig)["log_grad_norms_every"].startswith("steps; gradient norm of each loss term")
    assert field_comments(VisionConfig)["intermediate_size"].startswith("Of dinov2 a multiple of hidden_size")
    assert field_comments(VisionConfig)["num_layers"] == "of patch_mlp 0"
    assert field_comments(DataConfig)["on_state_mismatch"] == "What a resume does whose data state is another's."
    assert field_comments(PReConfig)["weight"] == "lambda"
