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

DOCS = Path(__file__).parents[2] / "docs"
EVERY = "NEMO_PRE_REHEARSE_EVERY_RECIPE"  # set by make rehearse


def test_the_table_is_made_of_the_record_and_names_every_recipe():
    recorded, names = record.read(DOCS), recipes.choices("experiment")
    table = (DOCS / record.TABLE).read_text()
    assert table == record.table(recorded), record.AGAIN
    assert recorded and set(recorded) <= set(names)
    for name in names:
        assert f"| {name} |" in table or f"- {name}\n" in table, record.AGAIN


def test_nothing_is_said_to_be_verified_on_a_gpu():
    recorded = record.read(DOCS)
    assert recorded and all(each["verified_on_a_gpu"] is None for each in recorded.values())


@pytest.mark.skipif(not os.environ.get(EVERY), reason="hours on two cores: make rehearse")
@pytest.mark.parametrize("name", recipes.choices("experiment"))
def test_a_recipe_rehearses_as_it_is_recorded(name):
    """Each with a layer a chunk."""
    config, recorded = compose_run([f"experiment={name}"]), record.read(DOCS).get(name)
    assert recorded is not None, f"{name} is not recorded: {record.AGAIN}"
    assert recorded["config"] == record.digest(config), record.AGAIN
    now = run_rehearsal(config, Wishes(layers=num_chunks(config.parallel), jobs=default_jobs()))
    assert now.met is None or now.met.problem is None
    assert recorded["at_a_layer_a_chunk"], f"{name} was recorded without messages: {record.AGAIN}"
    assert record.differences(recorded["at_a_layer_a_chunk"], [record.facts(found) for found in now.cut]) == []
