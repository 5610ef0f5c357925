"""What VIRAL refuses and warns of before a run, and what a plan counts of its frozen model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from nemo_pre.checks.run import check_options
from nemo_pre.config.run import RunConfig
from nemo_pre.objectives.viral import VIRAL
from nemo_pre.objectives.viral.head import AlignmentHead
from nemo_pre.planner.chunks import chunks_of_stages
from nemo_pre.planner.load import largest_load
from nemo_pre.planner.memory import state_memory
from nemo_pre.planner.parameters import model_parameters, not_counted
from tests.planner.shapes import tiny

ENCODER = {"target": "encoder"}


def run(parallel: dict[str, Any] | None = None, micro_batches: int = 1, **viral: Any) -> RunConfig:
    return tiny(parallel=parallel or {}, micro_batches=micro_batches, viral=viral)


@pytest.mark.parametrize(
    "viral, sentence",
    [
        ({}, "objective.viral.target=external needs objective.viral.target_path"),
        ({**ENCODER, "layers": [5]}, r"objective.viral.layers=\[5\] must name different layers between 1 and 4"),
        ({**ENCODER, "form": "cosine"}, "objective.viral.form=cosine is unknown: choose one of direct, similarity"),
        ({**ENCODER, "compared": "hidden"}, "objective.viral.compared=hidden has not the target's width"),
        ({**ENCODER, "head_depth": 0}, "objective.viral.head_depth=0 must be 1 or more"),
        ({**ENCODER, "weight": -1.0}, "objective.viral.weight=-1.0 must be 0 or more"),
    ],
)
def test_it_is_refused_in_one_sentence(viral: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        check_options(run(**viral))


def test_one_head_lies_in_one_chunk() -> None:
    two_stages = {"pipeline": 2}
    with pytest.raises(ValueError, match=r"shared_head=true needs .* one model chunk, and \[2, 4\] lie in 2"):
        check_options(run(two_stages, 4, **ENCODER, layers=[2, 4]))
    with pytest.raises(ValueError, match=r"\[1, 3\] lie in 2"):  # both on the first rank, in two virtual stages
        check_options(run({**two_stages, "virtual_pipeline": 2}, 4, **ENCODER, layers=[1, 3]))
    check_options(run(two_stages, 4, **ENCODER, layers=[3, 4]))
    check_options(run(two_stages, 4, **ENCODER, layers=[2, 4], shared_head=False))
    check_options(run(two_stages, 4, **ENCODER, layers=[2, 4], form="similarity", compared="hidden"))


@pytest.mark.parametrize(
    "viral, warning",
    [
        ({**ENCODER, "target_path": "x"}, "objective.viral.target_path has no effect with objective.viral.target=enc"),
        ({**ENCODER, "form": "similarity", "compared": "hidden", "head_depth": 2}, "head_depth has no effect with"),
    ],
)
def test_options_without_effect_are_named(viral: dict[str, Any], warning: str) -> None:
    assert any(warning in sentence for sentence in check_options(run(**viral)))


def test_a_plan_counts_the_frozen_model_that_lies_here(external_model: Path) -> None:
    from transformers import AutoModel

    config = run(target_path=str(external_model))
    parameters = sum(p.numel() for p in AutoModel.from_pretrained(external_model).parameters())
    assert not_counted(config) == []
    assert state_memory(config, 0)["frozen target"] == 4 * parameters
    head = AlignmentHead((config.model.language.hidden_size, 2048, 2048, 24))
    assert model_parameters(config)["viral"] == sum(p.numel() for p in head.parameters())
    cost = VIRAL(config).build_cost()
    assert cost is not None
    (chunk,) = chunks_of_stages(config)[0]
    assert cost.flops(largest_load(config), chunk, dense=True)["frozen target"].forward > 2 * parameters


def test_a_plan_says_that_it_does_not_count_a_model_that_is_elsewhere() -> None:
    (sentence,) = not_counted(run(target_path="nobody/nothing"))
    assert "frozen model of objective.viral is not counted" in sentence and "nobody/nothing" in sentence
