"""How the record of all recipes' rehearsals is kept."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from nemo_pre.config.compose import compose_run
from nemo_pre.launch.ranks import RankFailure
from nemo_pre.rehearsal import everything, record
from nemo_pre.rehearsal.compare import Beside
from nemo_pre.rehearsal.found import Found
from nemo_pre.rehearsal.places import Place
from nemo_pre.rehearsal.rendezvous import Met
from nemo_pre.rehearsal.run import Rehearsed


@pytest.fixture
def rehearsed():
    """What a rehearsal that needs no process would have found."""
    config = compose_run(["experiment=digits_tiny", "parallel=pp2"])
    found = Found(Place(0), 0, state={"weights": 60}, peaks=[90, 100], held=[60, 60], waits=[("a.py:1", 2)], kernels=7)
    beside = Beside(Place(0), {"weights": 60, "a step": 40}, {"weights": 60, "a step": 42})
    met = Met(messages=3, collectives=4)
    return Rehearsed(
        "digits_tiny", "NeMo 2.7.3", config, 2, 8, 3, [beside], [found], [[]], [found], met, 2, [], [], ["speed"]
    )


def test_an_entry_is_old_when_the_recipe_changes_or_more_layers_are_asked_for(rehearsed):
    config = rehearsed.config
    entry = record.entry(config, rehearsed)
    assert record.why_again(None, config, 2) == "not recorded"
    assert record.why_again(entry, config, 2) is None
    without = {**entry, "messages": None}
    assert record.why_again(without, config, 2) == "recorded without messages"
    assert record.why_again(without, config, 2, messages=False) is None
    assert record.why_again(entry, config, 8) == "recorded with 2 layers"
    moved = replace(config, output_dir="elsewhere", name="other", init_from="before")
    assert record.why_again(entry, moved, 2) is None
    assert record.why_again({**entry, "instruments": "before"}, config, 2) == "what rehearses is other code"
    longer = replace(config, data=replace(config.data, sequence_length=config.data.sequence_length * 2))
    assert record.why_again(entry, longer, 2) == "its configuration is another"


def test_an_option_that_is_new_makes_no_entry_old(rehearsed, monkeypatch):
    """Entries take minutes each; what another default would change is found as what other code would."""
    config, asdict = rehearsed.config, record.asdict

    def with_a_new_one(given):
        values = asdict(given)
        return {**values, "trainer": {**values["trainer"], "new": given.trainer is config.trainer and 1}}

    before = record.digest(config)
    monkeypatch.setattr(record, "asdict", lambda given: {**asdict(given), "new": {"a": 1, "b": None}, "newer": 3})
    assert record.digest(config) == before
    monkeypatch.setattr(record, "asdict", with_a_new_one)
    assert record.digest(config) != before, "set to something else than its default"


def test_an_entry_is_old_when_the_code_finds_something_else(rehearsed):
    facts = record.facts(rehearsed.found[0])
    assert record.differences([facts], [facts]) == []
    assert record.differences([facts], [{**facts, "kernels": 8}]) == ["rank 0: kernels was 7 and is 8"]
    assert record.differences([facts], [{**facts, "peak": 110}]) == ["rank 0: peak was 100 and is 110"]
    assert record.differences([{**facts, "peak": 10_000}], [{**facts, "peak": 10_001}]) == []
    assert record.differences([facts], [{**facts, "rank": 1}]) == ["rank 0 is recorded only", "rank 1 is not recorded"]


def test_an_entry_is_old_when_the_plan_is_another(rehearsed):
    entry = record.entry(rehearsed.config, rehearsed)
    (sentence,) = record.plan_differs(entry, rehearsed.config)
    assert sentence.startswith("stage 1 is planned as ") and sentence.endswith(", and was as 102.")
    now = int(sentence.split()[5])
    entry["ranks"][0]["planned"] = now
    assert record.plan_differs(entry, rehearsed.config) == []
    under = {
        **entry,
        "problems": ["a leak.", "stage 1: the plan is 50.00% under the rehearsed peak, 0.00 beside 0.00 GiB."],
    }
    under["ranks"] = [{**entry["ranks"][0], "planned": 50}]
    again = record.replanned(under, rehearsed.config)  # 100 bytes were rehearsed
    assert again["ranks"][0]["planned"] == now and again["ranks"][0]["over"] == round(now / 100 - 1, 5)
    assert again["problems"][0] == "a leak." and "over the rehearsed peak" in again["problems"][1]
    assert len(again["problems"]) == 2
    wider = replace(rehearsed.config, data=replace(rehearsed.config.data, sequence_length=512))
    assert record.plan_differs(entry, wider) != []


def test_the_table_says_which_entries_are_older_than_what_rehearses(rehearsed):
    entry = record.entry(rehearsed.config, rehearsed)
    assert "older than what rehearses" not in record.table({"a": entry})
    assert "older than what rehearses" in record.table({"a": {**entry, "instruments": "before"}})


def test_comments_do_not_make_what_rehearses_another(monkeypatch, tmp_path):
    """The digest is of the statements."""
    (tmp_path / "rehearsal").mkdir()
    monkeypatch.setattr(record, "__file__", str(tmp_path / "rehearsal" / "record.py"))
    monkeypatch.setattr(record, "INSTRUMENTS", ("rehearsal/device.py",))
    digests = []
    for text in ('"""Says."""\nA = 1\n', '"""Says more."""\n# why\nA = 1\n', '"""Says."""\nA = 2\n'):
        (tmp_path / "rehearsal" / "device.py").write_text(text)
        record.instruments.cache_clear()
        digests.append(record.instruments())
    record.instruments.cache_clear()
    assert digests[0] == digests[1] != digests[2]


def test_one_recipe_is_recorded_in_fp8_too():
    in_fp8 = [run for run in record.runs() if record.WITH in run]
    names = [compose_run(record.words_of(run)).precision.name for run in in_fp8]
    assert names == ["fp8_delayed", "fp8_tensorwise", "fp8_blockwise"]


def test_it_is_read_as_it_was_written_and_says_never_and_how_deep(rehearsed, tmp_path):
    entry = record.entry(rehearsed.config, rehearsed)
    record.write(tmp_path, {"b": entry, "a": {**entry, "problems": ["too much."]}})
    assert record.read(tmp_path) == json.loads(json.dumps({"a": {**entry, "problems": ["too much."]}, "b": entry}))
    rows = [line for line in (tmp_path / record.TABLE).read_text().splitlines() if line.startswith("| a ")]
    assert len(rows) == 1 and "| 2 of 8 |" in rows[0] and "| 3 + 4 |" in rows[0] and rows[0].endswith("| never |")
    assert "- a: too much." in (tmp_path / record.TABLE).read_text()
    assert sorted(path.name for path in tmp_path.iterdir()) == [record.FILE, record.TABLE]


def test_a_file_that_is_no_record_is_refused(tmp_path):
    (tmp_path / record.FILE).write_text('{"format": 99}')
    with pytest.raises(ValueError, match="is not a record of rehearsals"):
        record.read(tmp_path)


def test_all_goes_on_where_it_was_stopped_and_counts_what_has_problems(rehearsed, tmp_path, monkeypatch, capsys):
    done, planned = [], []

    def replanned(entry, config):
        planned.append(config.experiment)
        return entry

    def run(config, wishes, tell):
        done.append(config.experiment)
        return replace(rehearsed, layers=wishes.layers, problems=[])

    monkeypatch.setattr(everything, "run_rehearsal", run)
    monkeypatch.setattr(record, "replanned", replanned)
    names = ["digits_tiny", "digits_tiny_pre"]
    everything.rehearse_all(names[:1], out=str(tmp_path), layers=2)
    everything.rehearse_all(names, out=str(tmp_path), layers=2)
    assert done == names and planned == names[:1]
    everything.rehearse_all(names[:1], out=str(tmp_path), layers=2, again=True)
    assert done == [*names, names[0]]
    with pytest.raises(ValueError, match="nothing is no recipe"):
        everything.rehearse_all(["nothing"], out=str(tmp_path))


@pytest.fixture
def old_entry(rehearsed):
    """An entry whose plan is as it is now, of code that rehearses otherwise."""
    entry = json.loads(json.dumps(record.replanned(record.entry(rehearsed.config, rehearsed), rehearsed.config)))
    return {**entry, "instruments": "before", "commit": "first", "not_covered": ["speed", "weather"]}


def test_an_entry_is_confirmed_where_everything_is_found_again(rehearsed, old_entry):
    config, now = rehearsed.config, replace(rehearsed, layers=1)
    assert record.why_unconfirmable(old_entry, config) == [] == record.why_unconfirmed(old_entry, now)
    entry = record.confirmed(old_entry, now)
    assert record.why_again(entry, config, 2) is None and entry["commit"] == "first" and entry["layers"] == 2
    assert entry["confirmed"] == record.commit() and entry["not_covered"] == ["speed"]
    assert f"| first, confirmed by {record.commit()} |" in record.table({"a": entry})
    older = {**entry, "instruments": "before"}
    assert "| first, confirmed by " in record.table({"a": older}) and ", older than what" in record.table({"a": older})
    entry.pop("confirmed")  # as entries were before there were confirmations
    assert "| first |" in record.table({"a": entry})


def test_an_entry_of_something_else_is_not_confirmed_and_says_why(rehearsed, old_entry):
    config = rehearsed.config
    longer = replace(config, data=replace(config.data, sequence_length=config.data.sequence_length * 2))
    assert record.why_unconfirmable(None, config) == ["not recorded"]
    assert record.why_unconfirmable(old_entry, longer) == ["its configuration is another"]
    assert record.why_unconfirmable({**old_entry, "at_a_layer_a_chunk": []}, config) == ["recorded without messages"]
    (planned,) = record.why_unconfirmable({**old_entry, "ranks": [{**old_entry["ranks"][0], "planned": 7}]}, config)
    assert planned.endswith("and was as 7.")
    found, met = rehearsed.found[0], rehearsed.met
    for change, why in (
        ({"cut": [replace(found, kernels=8)]}, ["rank 0: kernels was 7 and is 8"]),
        ({"cut": [replace(found, waits=[])]}, ["rank 0: host_waits was 2 and is 0"]),
        ({"cut": [replace(found, peaks=[90, 101])]}, ["rank 0: peak was 100 and is 101"]),
        ({"cut": []}, ["rank 0 is recorded only"]),
        ({"met": replace(met, messages=4)}, ["messages were 3 and are 4"]),
        ({"met": replace(met, problem="rank 0 waits.")}, ["rank 0 waits."]),
        ({"met_ranks": 3}, ["met_ranks were 2 and are 3"]),
    ):
        assert record.why_unconfirmed(old_entry, replace(rehearsed, **change)) == why


def test_all_confirms_what_is_old_for_the_code_alone_and_leaves_the_rest(
    rehearsed, old_entry, tmp_path, monkeypatch, capsys
):
    depths, kernels = [], [7, 8]

    def run(config, wishes, tell):
        depths.append(wishes.layers)
        return replace(rehearsed, layers=1, cut=[replace(rehearsed.found[0], kernels=kernels.pop(0))])

    monkeypatch.setattr(everything, "run_rehearsal", run)
    monkeypatch.setattr(everything, "compose_run", lambda words: rehearsed.config)
    names = ["digits_tiny", "digits_tiny_pre"]
    record.write(tmp_path, dict.fromkeys(names, old_entry))
    with pytest.raises(RankFailure, match=r"1 of 2 entries could not be confirmed: .* rehearse all digits_tiny_pre "):
        everything.rehearse_all(out=str(tmp_path), jobs=1, confirm=True)
    assert "digits_tiny_pre is not confirmed: rank 0: kernels was 7 and is 8." in capsys.readouterr().err
    first, second = (record.read(tmp_path)[name] for name in names)
    assert first == record.confirmed(old_entry, rehearsed) and second == old_entry
    everything.rehearse_all(names[:1], out=str(tmp_path), jobs=1, confirm=True)  # of this code: nothing to do
    assert depths == [2, 2], "a layer a chunk"
    assert (
        capsys.readouterr().out
        == f"0 entries confirmed, 1 are of this code; next: nemo-pre rehearse all out={tmp_path}\n"
    )
    with pytest.raises(RankFailure, match="could not be confirmed"):
        everything.rehearse_all(["llava15_7b_stage1_align"], out=str(tmp_path), confirm=True)
    assert "llava15_7b_stage1_align is not confirmed: not recorded." in capsys.readouterr().err


@pytest.mark.parametrize("other", [{"again": True}, {"layers": 2}, {"messages": False}])
def test_a_confirmation_takes_no_other_depth(other, tmp_path):
    with pytest.raises(ValueError, match="confirm=true rehearses at a layer a chunk"):
        everything.rehearse_all(out=str(tmp_path), confirm=True, **other)
