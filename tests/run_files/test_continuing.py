"""A run in a directory that holds one: what goes on, with which options, and what is refused before it starts."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from nemo_pre import cli
from nemo_pre.config.compose import compose_run, save_resolved
from nemo_pre.config.help import run_options
from nemo_pre.config.on_resume import RULES, rule_of, table, with_table
from nemo_pre.config.run import RunConfig
from nemo_pre.objectives.registry import known
from nemo_pre.options import APPLIED, KEPT, REFUSED
from nemo_pre.run_files.checkpoints import (
    PROGRESS,
    newest_checkpoint,
    newest_step,
    record_progress,
    record_sizes,
    run_checkpoints,
    step_of,
)
from nemo_pre.run_files.continuing import Continuation, continuation

TRAINING_PAGE = Path(__file__).parents[2] / "docs" / "training.md"
RUN = ["experiment=digits_tiny_pre", "trainer.max_steps=12"]


def saved(config: RunConfig, step: int, name: str | None = None) -> Path:
    """A checkpoint as far as files without weights go."""
    path = Path(config.output_dir) / "checkpoints" / (name or f"step={step}")
    save_resolved(config, path / "config.yaml")
    record_progress(path, step)
    record_sizes(path)
    return path


@pytest.fixture
def run(tmp_path: Path) -> Callable[..., RunConfig]:
    """The run of ``RUN`` in one directory, with more options."""
    return lambda *more: compose_run([*RUN, f"output_dir={tmp_path / 'run'}", *more])


def of(config: RunConfig) -> Continuation:
    found = continuation(config)
    assert found is not None
    return found


def test_every_option_has_one_rule_and_every_rule_an_option() -> None:
    names = {option.name for option in run_options() if "[0]" not in option.name}
    assert not [name for name in sorted(names) if rule_of(name) is None]
    assert not sorted(RULES.keys() - names)
    for objective in known().values():
        fields = {name.removeprefix(f"objective.{objective.name}.") for name in names if f".{objective.name}." in name}
        declared = {*objective.on_resume, "enabled"}
        assert not [field for field in fields if not {field, field.rpartition(".")[0]} & declared], objective.name
        assert not [each for each in declared if not any(f"{field}.".startswith(f"{each}.") for field in fields)]


def test_the_manuals_table_is_made_of_the_rules() -> None:
    page = TRAINING_PAGE.read_text()
    assert table() in page and with_table(page) == page, "python -m nemo_pre.config.on_resume docs/training.md"


def test_an_empty_directory_begins_and_the_same_options_go_on_unchanged(run: Callable[..., RunConfig]) -> None:
    assert continuation(run()) is None and continuation(run("resume=false")) is None
    checkpoint = saved(run(), 6)
    found = of(run())
    assert (found.checkpoint, found.step, found.changes, found.complete) == (str(checkpoint), 6, [], False)
    assert found.config == run()
    assert found.sentences() == [f"continues   at step 6 of 12, from {checkpoint}"]


# Other values of one option, and what becomes of it.
CHANGES = {
    APPLIED: """optim.lr=1e-4 optim.lr_vision=1e-5 optim.min_lr_ratio=0.1 optim.weight_decay=0.1 optim.beta1=0.8
        optim.beta2=0.9 optim.eps=1e-6 optim.clip_grad=2 optim.warmup_ratio=0.5 trainer.max_steps=24 seed=7
        trainer.global_batch_size=8 trainer.micro_batch_size=2 trainer.keep_checkpoints=9 trainer.log_every=3
        parallel.tensor=2 parallel.data=2 parallel.recompute=full objective.lm_weight=0.5 objective.pre.weight=0.1
        objective.pre.schedule.kind=linear objective.pre.head_activation=relu
        cluster.partition=gpu data.path=elsewhere data.num_workers=3 name=other data.sequence_length=96
        data.image_resize=crop model.language.max_position_embeddings=512""",
    KEPT: "init_from=elsewhere model.language.init_std=0.5",
    REFUSED: """model.language.hidden_size=256 model.vision.num_layers=2 model.rope=2d model.attention=mixed
        model.vision.feature_layer=-2 optim.freeze_vision=true parallel.distributed_optimizer=false precision.name=bf16
        objective.pre.enabled=false objective.laver.enabled=true objective.pre.layers=[3]
        objective.pre.ema_momentum=0.9 objective.pre.head_norm=true data.shuffle_seed=3 data.packing=true
        data.blend=[{path:a,weight:1},{path:b,weight:2}]""",
    "nothing": "objective.laver.mask_ratio=0.5 data.blend=null dry_run=true",  # off, the same, of one start
}
OTHER_WEIGHTS = ("model.language.hidden_size", "model.vision.num_layers")


@pytest.mark.parametrize("does, change", [(does, each) for does, text in CHANGES.items() for each in text.split()])
def test_what_becomes_of_a_changed_option(run: Callable[..., RunConfig], does: str, change: str) -> None:
    before, now, name = run(), run(change), change.partition("=")[0]
    checkpoint = saved(before, 6)
    if does == REFUSED:
        with pytest.raises(ValueError) as refusal:
            continuation(now)
        sentence = str(refusal.value)
        assert f"at step 6, cannot go on with {name}=" in sentence and "\n" not in sentence and sentence.endswith(".")
        new_run = f"init_from={checkpoint.parent} output_dir={before.output_dir}_2"
        assert (f"by adding {new_run}." in sentence) == (name not in OTHER_WEIGHTS)
        if name not in OTHER_WEIGHTS:
            assert continuation(run(change, *new_run.split())) is None, "and these words start it"
        return
    found = of(now)
    changed = [] if does == "nothing" else [(name, does)]
    assert [(each.name, each.rule.does) for each in found.changes] == changed
    assert all(name in found.sentences()[-1] for name, _ in changed)
    assert found.config == (before if does == KEPT else now), "what is kept is kept in the configuration too"


def test_the_data_may_begin_anew_where_that_is_said(run: Callable[..., RunConfig]) -> None:
    saved(run(), 6)
    found = of(run("data.shuffle_seed=3", "data.on_state_mismatch=restart"))
    assert "data.shuffle_seed=3 (before 0)" in found.sentences()[1]
    assert "begins anew" in found.sentences()[1]


def test_all_that_stands_in_the_way_is_named_at_once(run: Callable[..., RunConfig]) -> None:
    saved(run(), 6)
    both = (
        r"model.rope=2d \(before 1d\) and optim.freeze_vision=true \(before false\), since .*; .*: set them back, or"
    )
    with pytest.raises(ValueError, match=both):
        continuation(run("model.rope=2d", "optim.freeze_vision=true"))


def test_the_same_layers_in_other_words_go_on(run: Callable[..., RunConfig]) -> None:
    saved(run("objective.pre.layers=null"), 6)
    assert of(run("objective.pre.layers=[4]")).changes[0].rule.does == APPLIED
    with pytest.raises(
        ValueError, match=r"objective.pre.layers=\[3,4\] \(before null\), .* \(for other layers\): set it"
    ):
        continuation(run("objective.pre.layers=[3,4]"))


def test_another_blend_is_refused_and_the_same_elsewhere_is_not(run: Callable[..., RunConfig]) -> None:
    saved(run("data.blend=[{path:a,weight:1},{path:b,weight:2}]"), 6)
    assert of(run("data.blend=[{path:c,weight:0.5},{path:d,weight:1}]")).changes[0].name == "data.blend"
    with pytest.raises(ValueError, match="cannot go on with data.blend="):
        continuation(run("data.blend=[{path:a,weight:1},{path:b,weight:1}]"))


def test_a_run_past_the_wanted_length_is_refused_and_resume_false_too(run: Callable[..., RunConfig]) -> None:
    saved(run("trainer.max_steps=800"), 800)
    with pytest.raises(ValueError, match=r"is at step 800, past trainer.max_steps=100: set it to more than 800"):
        continuation(run("trainer.max_steps=100"))
    with pytest.raises(ValueError, match=r"holds a run at step 800, beside which resume=false cannot begin"):
        continuation(run("resume=false"))


def test_a_complete_run_says_so_and_what_it_does_not_do(run: Callable[..., RunConfig]) -> None:
    saved(run(), 12)
    assert of(run()).complete
    (sentence,) = of(run("optim.lr=1")).sentences()
    assert "is complete at step 12 of 12, and nothing is trained with optim.lr=1.0 (before 0.0015): raise" in sentence
    assert not of(run("trainer.max_steps=13")).complete


@pytest.mark.parametrize(
    "more, code, words",
    [
        ([], 0, "is complete at step 12 of 12"),
        (["dry_run=true"], 0, "is complete at step 12 of 12"),
        (["trainer.max_steps=24", "dry_run=true"], 0, "continues   at step 12 of 24"),
        (["trainer.max_steps=6"], 2, "is at step 12, past trainer.max_steps=6"),
        (["objective.pre.enabled=false"], 2, "cannot go on with objective.pre.enabled=false (before true)"),
        (["resume=false"], 2, "beside which resume=false cannot begin another one"),
    ],
    ids=["the same again", "dry run", "dry run of more", "shorter", "another objective", "resume=false"],
)
def test_a_start_that_trains_nothing_touches_nothing(tmp_path, monkeypatch, capsys, more, code, words) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("nemo_pre.checks.run.check_presence", lambda *_: "")
    monkeypatch.setattr("nemo_pre.launch.ranks.launch", lambda *_: pytest.fail("ranks were started"))
    options = [*RUN, "output_dir=run"]
    saved(compose_run(options), 12)
    Path("run/config.yaml").write_text("the run's own")
    Path("run/metrics.jsonl").write_text('{"step": 12}\n{"step": 13}\n')
    before = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in Path("run").rglob("*") if path.is_file()}
    assert cli.main(["train", *options, *more]) == code
    assert words in capsys.readouterr().err
    after = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in Path("run").rglob("*") if path.is_file()}
    assert after == before


def test_the_ranks_are_given_what_is_kept(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("nemo_pre.checks.run.check_presence", lambda *_: "")
    started: list[RunConfig] = []
    monkeypatch.setattr("nemo_pre.launch.ranks.launch", lambda config, entry, **_: started.append(config))
    options = [*RUN, "output_dir=run", "init_from=former"]
    saved(compose_run(options), 6)
    assert cli.main(["train", *options[:-1], "optim.lr=1e-4"]) == 0
    assert (started[0].init_from, started[0].optim.lr) == ("former", 1e-4)
    said = capsys.readouterr().err
    assert "init_from stays former, not null: the run has weights of its own." in said
    assert "optim.lr=0.0001 (before 0.0015): from the next step on." in said


def test_other_samples_are_refused_before_ranks_start(run: Callable[..., RunConfig], digits: Path, tmp_path) -> None:
    from nemo_pre.checks.run import check_run
    from nemo_pre.data.manifest import read_manifest

    here, moved, other = run(f"data.path={digits}"), tmp_path / "moved", tmp_path / "other"
    checkpoint = saved(here, 6)
    record_progress(checkpoint, 6, f"{read_manifest(digits).fingerprint}, packed as ever")
    record_sizes(checkpoint)
    for copy in (moved, other):
        shutil.copytree(digits, copy)
    manifest = json.loads((other / "manifest.json").read_text())
    manifest["splits"]["train"]["shards"][0]["sha256"] = "0" * 64
    (other / "manifest.json").write_text(json.dumps(manifest))
    assert "data.path=" in check_run(run(f"data.path={moved}")).summary()
    with pytest.raises(ValueError, match=r"at step 6, was trained on other samples than those of .*other: give it"):
        check_run(run(f"data.path={other}"))
    check_run(run(f"data.path={other}", "data.on_state_mismatch=restart"))


def test_the_newest_checkpoint_is_the_one_saved_last_whatever_its_name_and_time(run: Callable[..., RunConfig]) -> None:
    config = run()
    older, newer = saved(config, 6), saved(config, 2, "step=2-v1")
    directory = older.parent
    assert newest_checkpoint(directory) == str(newer) and newest_step(directory) == 2
    (older / PROGRESS).write_text(json.dumps({**json.loads((older / PROGRESS).read_text()), "time": 1e12}))
    record_sizes(older)
    assert newest_checkpoint(directory) == str(newer)
    third = saved(config, 4, "step=4")
    assert run_checkpoints(directory) == [older, newer, third] and of(config).step == 4
    shutil.rmtree(third)
    shutil.copytree(newer, directory.parent / "copy" / "step=2")
    assert step_of(directory.parent / "copy" / "step=2") == 2


def test_a_checkpoint_that_does_not_say_where_it_is_counts_by_its_name(run: Callable[..., RunConfig]) -> None:
    config = run()
    paths = [saved(config, step) for step in (10, 9)]
    for path in paths:
        (path / PROGRESS).unlink()
        record_sizes(path)
    directory = paths[0].parent
    assert newest_step(directory) == 10
    last = saved(config, 3)
    assert newest_checkpoint(directory) == str(last), "one that says so was saved later"
    assert step_of(directory.parent / "import") is None


def test_a_newest_checkpoint_whose_place_cannot_be_read_is_passed_over_and_that_is_said(
    run: Callable[..., RunConfig], caplog: pytest.LogCaptureFixture
) -> None:
    config = run()
    first, last = saved(config, 3), saved(config, 6)
    (last / PROGRESS).write_text('{"step": 6, "sav')
    with caplog.at_level(logging.WARNING):
        assert newest_checkpoint(first.parent) == str(first)
    assert "step=6 is damaged" in caplog.text


@pytest.mark.parametrize("former_stage", ["there", "moved"])
def test_a_run_goes_on_with_the_tokenizer_of_its_weights_and_its_checkpoints_go_on_naming_it(
    former_stage, digits, tmp_path
) -> None:
    """It names none, and none lies with its data: the checks find the one that came with the weights."""
    import shutil

    from nemo_pre.checks.run import check_run

    weights, data = tmp_path / "weights", tmp_path / "data"
    shutil.copytree(digits, data)
    weights.mkdir()
    shutil.move(data / "tokenizer", weights / "huggingface")
    manifest = data / "manifest.json"
    manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "tokenizer": None}))
    words = ["experiment=digits_tiny", f"data.path={data}", f"output_dir={tmp_path / 'run'}", "platform=cpu"]
    words.append(f"init_from={weights}")
    save_resolved(compose_run(words), weights / "config.yaml")
    (weights / "weights").mkdir()
    begun = compose_run(words)
    check_run(begun)
    assert begun.model.tokenizer == str(weights / "huggingface")
    known = begun.model.tokenizer
    if former_stage == "moved":
        known = begun.model.tokenizer = str(digits / "tokenizer")  # a folder that stays
        shutil.rmtree(weights)
    saved(begun, 3)
    goes_on = check_run(compose_run([*words, "trainer.max_steps=12"])).continuation
    assert goes_on is not None and goes_on.config.model.tokenizer == known
    assert not [sentence for sentence in goes_on.sentences() if "tokenizer" in sentence], "nobody has changed it"


@pytest.mark.parametrize("is_gone", [False, True])
def test_a_run_does_not_go_on_with_other_words_because_its_tokenizer_is_no_longer_named(
    is_gone, digits, tmp_path
) -> None:
    """The data have one of their own, which a run that begins would take."""
    import shutil

    from nemo_pre.checks.run import check_run

    own = tmp_path / "own"
    shutil.copytree(digits / "tokenizer", own)
    words = ["experiment=digits_tiny", f"data.path={digits}", f"output_dir={tmp_path / 'run'}", "platform=cpu"]
    saved(compose_run([*words, f"model.tokenizer={own}"]), 3)
    if is_gone:
        shutil.rmtree(own)
        with pytest.raises(ValueError, match=f"model.tokenizer={own}"):
            check_run(compose_run(words))
        return
    goes_on = check_run(compose_run(words)).continuation
    assert goes_on is not None and goes_on.config.model.tokenizer == str(own)
