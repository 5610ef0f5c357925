"""The record of recipes' rehearsals: of the recipes as they are, and of the code as it is."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

import recipes
from nemo_pre.config.compose import compose_run
from nemo_pre.planner.chunks import num_chunks
from nemo_pre.rehearsal import record
from nemo_pre.rehearsal.rehearse import default_jobs
from nemo_pre.rehearsal.run import Wishes, run_rehearsal
from tests.composed import experiment

DOCS = Path(__file__).parents[2] / "docs"
EVERY = "NEMO_PRE_REHEARSE_EVERY_RECIPE"  # set by make rehearse


RECORDED = record.read(DOCS)
# A rank of each takes a few seconds with a layer.
IN_EVERY_TEST = ("llava15_7b_stage1_align", "siglip2_qwen25_7b_laver_stage2_knowledge")


def test_the_table_is_made_of_the_record_and_names_every_recipe():
    """It also says which entries are older than the code that rehearses: make it anew with record.table."""
    names = record.runs()
    table = (DOCS / record.TABLE).read_text()
    assert table == record.table(RECORDED), record.AGAIN
    assert RECORDED and set(RECORDED) <= set(names) and set(recipes.choices("experiment")) < set(names)
    for name in names:
        assert f"| {name} |" in table or f"- {name}\n" in table, record.AGAIN


@pytest.mark.parametrize("name", RECORDED)
def test_what_is_recorded_is_of_the_recipe_and_of_the_plan_as_they_are(name):
    words = record.words_of(name)
    config = experiment(name) if words == [f"experiment={name}"] else compose_run(words)
    assert RECORDED[name]["config"] == record.digest(config), record.AGAIN
    assert record.plan_differs(RECORDED[name], config) == [], record.AGAIN


def test_nothing_is_said_to_be_verified_on_a_gpu():
    recorded = record.read(DOCS)
    assert recorded and all(each["verified_on_a_gpu"] is None for each in recorded.values())


@pytest.mark.parametrize("name", IN_EVERY_TEST)
def test_a_few_recipes_rehearse_as_they_are_recorded(name):
    rehearses_as_recorded(name)


@pytest.mark.skipif(not os.environ.get(EVERY), reason="hours on two cores: make rehearse")
@pytest.mark.parametrize("name", [name for name in record.runs() if name not in IN_EVERY_TEST])
def test_every_recipe_rehearses_as_it_is_recorded(name):
    rehearses_as_recorded(name)


def rehearses_as_recorded(name):
    """With a layer a chunk."""
    config = compose_run(record.words_of(name))
    assert name in RECORDED, f"{name} is not recorded: {record.AGAIN}"
    assert RECORDED[name]["config"] == record.digest(config), record.AGAIN
    now = run_rehearsal(config, Wishes(layers=num_chunks(config.parallel), jobs=default_jobs()))
    assert now.met is None or now.met.problem is None
    assert RECORDED[name]["at_a_layer_a_chunk"], f"{name} was recorded without messages: {record.AGAIN}"
    assert record.differences(RECORDED[name]["at_a_layer_a_chunk"], [record.facts(found) for found in now.cut]) == []
