"""A run takes its model from the checkpoint it starts from, and what cannot be started from is refused unbuilt."""

from __future__ import annotations

import shutil

import pytest

from nemo_pre.checks.presence import check_init_from
from nemo_pre.config.compose import compose_run, save_resolved
from nemo_pre.run_files.saved_config import NOT_WEIGHTS
from nemo_pre.slurm.submit import parse, render

# A model that is in no recipe.
MODEL = [
    "model.name=strange", "model.language.num_layers=5", "model.language.hidden_size=96", "model.tokenizer=/its/own",
    "model.language.num_attention_heads=6", "model.language.rope_scaling.kind=linear", "model.vision.image_size=40",
    "model.language.rope_scaling.factor=2", "model.projector=mlp1x_gelu", "model.vision.image_std=[0.1,0.2,0.3]",
    "model.attention=mixed", "model.attention_backend=split", "data.image_filter=bilinear",
]  # fmt: skip


@pytest.fixture
def held(tmp_path):
    """A run's checkpoints of that model; the newest by number is not the last by name."""
    strange = compose_run(["experiment=digits_tiny", *MODEL])
    for step in (9, 10):
        save_resolved(strange, tmp_path / "checkpoints" / f"step={step}" / "config.yaml")
        (tmp_path / "checkpoints" / f"step={step}" / "weights").mkdir()
        strange.model.language.ffn_hidden_size += 1
    return tmp_path / "checkpoints"


@pytest.mark.parametrize("of", ["checkpoints", "step=10"])
def test_the_checkpoint_brings_its_model_and_how_its_pictures_are_resized(held, of):
    start = held if of == "checkpoints" else held / of
    run = compose_run(["experiment=digits_tiny_pre", "model=of_init_from", f"init_from={start}"])
    expected = compose_run(["experiment=digits_tiny", *MODEL]).model
    expected.language.ffn_hidden_size += 1
    expected.tokenizer, expected.attention_backend = None, "auto"
    assert run.model == expected
    assert (run.data.image_filter, run.name, run.objective.pre.enabled) == ("bilinear", "digits_tiny_pre", True)
    check_init_from(run)


def test_a_run_that_names_no_model_takes_it_too_and_without_weights_the_demos(held):
    words = ["data=digits", "optim.lr=1e-3", "name=x", "trainer.max_steps=3", "trainer.global_batch_size=8"]
    words.append("trainer.micro_batch_size=4")
    assert compose_run([*words, f"init_from={held}"]).model.name == "strange"
    assert compose_run(words).model == compose_run(["experiment=digits_tiny"]).model
    assert compose_run(["experiment=digits_tiny", f"init_from={held}"]).model.name == "digits_tiny", "it names one"


def test_stages_and_the_command_line_have_the_last_word_but_not_on_weights(held):
    words = ["experiment=digits-laver", "model=of_init_from", f"init_from={held}"]
    run = compose_run([*words, "model.rope_sections=[4,4]", "model.name=mine"])
    assert (run.model.attention, run.model.rope, run.model.rope_sections) == ("mixed", "2d", [4, 4])
    assert (run.model.name, run.model.language.num_layers) == ("mine", 5)
    check_init_from(run)
    with pytest.raises(
        ValueError, match=r"model.language.num_layers=6 but .*step=10 was made with 5: choose the model"
    ):
        check_init_from(compose_run([*words, "model.language.num_layers=6"]))
    assert "language.num_layers" not in NOT_WEIGHTS


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ([], "^model=of_init_from needs init_from=CHECKPOINT"),
        (["init_from=checkpoints/${model.name}"], "^model=of_init_from needs init_from=CHECKPOINT"),
        (["init_from=/etc"], "^model=of_init_from finds no config.yaml in init_from=/etc: "),
        (["init_from=/nowhere"], "^model=of_init_from finds no config.yaml in init_from=/nowhere: "),
    ],
)
def test_a_model_that_nobody_holds_is_asked_for_in_one_sentence(words, sentence):
    with pytest.raises(ValueError, match=sentence):
        compose_run(["experiment=digits_tiny", "model=of_init_from", *words])


@pytest.mark.parametrize("text", ["", "a: [", "model: 7", "model: {hidden: 3}", "- 1", "\x00", "model: {vision: [1]}"])
def test_a_file_that_is_not_a_runs_configuration_is_named(held, text):
    for step in (9, 10):
        (held / f"step={step}" / "config.yaml").write_text(text)
    with pytest.raises(ValueError) as refusal:
        compose_run(["experiment=digits_tiny", "model=of_init_from", f"init_from={held}"])
    assert "\n" not in str(refusal.value)
    assert "is not a run's configuration" in str(refusal.value) or text == ""


# --- before anything is queued ---------------------------------------------------------------------------------------

JOB = ["experiment=digits_tiny", "platform=cpu", "cluster=slurm_site", "cluster.devices_per_node=null"]


def submit_words(*words):
    return render(parse([*JOB, *words]))


@pytest.mark.parametrize("more", [[], ["--dry-run"]])
def test_a_job_is_not_queued_for_weights_that_it_cannot_start_from(held, digits, tmp_path, more):
    def refused(start, sentence):
        with pytest.raises(ValueError, match=sentence):
            submit_words(f"data.path={digits}", f"output_dir={tmp_path}/run", f"init_from={start}", *more)

    refused("/etc", "^init_from=/etc is neither a checkpoint nor a directory with complete checkpoints")
    refused(held, "model.vision.image_size=48 but .*step=10 was made with 40")
    foreign = tmp_path / "foreign"
    (foreign / "weights").mkdir(parents=True)
    refused(foreign, "foreign has no config.yaml: name a checkpoint that a run or nemo-pre import wrote")
    if not more:
        refused(tmp_path / "typo", "typo is not a directory: train the former stage, or import weights, first")
    (job,) = submit_words(f"data.path={digits}", f"init_from={held}", "model=of_init_from", *more)
    assert f"init_from={held}" in job.script


def test_a_run_that_goes_on_from_its_own_checkpoints_does_not_need_the_former_ones(held, tmp_path):
    words = ["experiment=digits_tiny", "model=of_init_from", f"init_from={held}", f"output_dir={tmp_path}/run"]
    run = compose_run(words)
    shutil.copytree(held, tmp_path / "run" / "checkpoints")
    shutil.rmtree(held)
    check_init_from(run)
    run.resume = False
    with pytest.raises(ValueError, match="is not a directory"):
        check_init_from(run)


@pytest.mark.parametrize("more", [[], ["--dry-run"]])
def test_a_chain_is_queued_before_its_first_stage_has_a_checkpoint(held, digits, tmp_path, monkeypatch, more):
    monkeypatch.chdir(tmp_path)
    chain = ["chain=[digits_tiny,digits_tiny_pre,export]", *JOB[1:], "parallel=single", f"data.path={digits}", *more]
    first, second, _ = render(parse(chain))
    assert "init_from=runs/digits_tiny/checkpoints" in second.script and "init_from" not in first.script[:2000]
    first, second, _ = render(parse([*chain, f"init_from={held}", "model=of_init_from", "objective.pre.layers=[2]"]))
    assert f"init_from={held}" in first.script
    assert f"init_from={held}" not in second.script and "init_from=runs/digits_tiny/checkpoints" in second.script
    own = tmp_path / "recipes" / "experiment"
    own.mkdir(parents=True)
    longer = "# @package _global_\ndefaults: [digits_tiny]\nname: longer\nmodel:\n  language:\n    num_layers: 9\n"
    (own / "longer.yaml").write_text(longer)
    with pytest.raises(ValueError, match="but digits_tiny, the stage before it, was made with 8"):
        render(parse(["chain=[digits_tiny,longer]", *chain[1:]]))
