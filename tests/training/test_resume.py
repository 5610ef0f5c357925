"""A checkpoint continues in another layout as if nothing had happened, and starts a new run with another objective."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from nemo_pre.checkpoint_files.inspection import Finding, inspect
from tests.ranks import RankError
from tests.training.job import train

STEPS, SAVED = 8, 3


def overrides(output: Path, data: Path, *more: str) -> list[str]:
    return [
        "experiment=digits_tiny_pre",
        f"output_dir={output}",
        f"data.path={data}",
        "platform=cpu",
        "model.language.num_layers=4",
        "objective.pre.layers=[3]",
        "objective.pre.ema_momentum=0.9",
        f"trainer.max_steps={STEPS}",
        f"trainer.checkpoint_every={SAVED}",
        "trainer.keep_checkpoints=9",
        "trainer.global_batch_size=8",
        "trainer.micro_batch_size=2",
        "trainer.log_every=1",
        "trainer.val_samples=0",
        "data.record_samples=true",
        *more,
    ]


def losses(output: Path) -> dict[int, tuple[float, float]]:
    """L_LM and L_PRe by step."""
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: (line["lm/loss"], line["pre/loss"]) for line in lines if "lm/loss" in line}


def samples(output: Path) -> dict[int, list[str]]:
    """The names of what each step trained on, in alphabetical order: ranks share them out in another one."""
    lines = [json.loads(line) for line in (output / "samples.jsonl").read_text().splitlines()]
    assert all(len(set(line["samples"])) == 8 for line in lines)
    return {line["step"]: sorted(line["samples"]) for line in lines}


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, digits) -> Path:
    """A run at TP2 x PP2 with the distributed optimizer, checkpointed on the way."""
    output = tmp_path_factory.mktemp("uninterrupted")
    layout = ["parallel.tensor=2", "parallel.pipeline=2", "parallel.sequence=true"]
    train(4, overrides(output, digits, *layout))
    return output


def continued(uninterrupted: Path, output: Path) -> Path:
    """A directory with nothing but the checkpoint after step SAVED."""
    shutil.copytree(uninterrupted / "checkpoints" / f"step={SAVED}", output / "checkpoints" / f"step={SAVED}")
    return output


@pytest.mark.parametrize(
    "ranks, layout",
    [
        (1, ["parallel=single"]),
        (2, ["parallel=single", "parallel.data=2"]),
        (2, ["parallel=single", "parallel.pipeline=2", "trainer.async_checkpoint=true"]),
    ],
    ids=["TP1", "DP2", "PP2-async"],
)
def test_the_next_losses_after_resuming_elsewhere_equal_the_uninterrupted_runs(
    uninterrupted, digits, tmp_path, ranks, layout
):
    output = continued(uninterrupted, tmp_path)
    if "parallel.data=2" in layout:  # with a later checkpoint that has 64 other bytes
        changed = shutil.copytree(uninterrupted / "checkpoints" / "step=6", output / "checkpoints" / "step=6")
        with next((changed / "weights").glob("*.distcp")).open("r+b") as file:
            file.seek(5000)
            file.write(b"\x55" * 64)
    train(ranks, overrides(output, digits, *layout))
    assert len(list((output / "checkpoints").glob("damaged-step=6-*"))) == layout.count("parallel.data=2")
    for saved in (output / "checkpoints").glob("step=*"):
        assert inspect(saved) == Finding(), "what was written, in the background too, has its checksums"
    expected, found = losses(uninterrupted), losses(output)
    assert sorted(found) == list(range(SAVED + 1, STEPS + 1))
    for step, (lm, pre) in found.items():
        # float32 sums in another order; after five steps of Adam 1e-5 was the most that was seen
        assert lm == pytest.approx(expected[step][0], rel=2e-5), f"L_LM at step {step}"
        assert pre == pytest.approx(expected[step][1], abs=2e-5), f"L_PRe at step {step}"
    assert samples(output) == {step: of for step, of in samples(uninterrupted).items() if step > SAVED}
    assert (output / "checkpoints" / f"step={STEPS}" / "config.yaml").is_file()


def test_a_new_run_without_pre_starts_from_a_checkpoint_with_it(uninterrupted, digits, tmp_path):
    output, former = tmp_path / "new", f"init_from={continued(uninterrupted, tmp_path) / 'checkpoints'}"
    plain = overrides(output, digits, "parallel=single", "objective=none", "trainer.max_steps=1", former)
    plain = [item for item in plain if not item.startswith("objective.pre")]
    train(1, plain, saves=False)
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    trained = [line for line in lines if "lm/loss" in line]
    assert trained and not any("pre/loss" in line for line in lines)
    assert trained[0]["lm/loss"] < losses(uninterrupted)[1][0], "the checkpoint's weights were not taken over"


def test_a_stage_starts_from_the_newest_weights_of_the_former_stage(uninterrupted, digits, tmp_path):
    former = uninterrupted / "checkpoints"
    stage = ["parallel=single", "trainer.max_steps=1", f"init_from={former}", "optim.freeze_vision=true"]
    train(1, overrides(tmp_path, digits, *stage), saves=False)
    found, first, last = losses(tmp_path), losses(uninterrupted)[1], losses(uninterrupted)[STEPS]
    assert list(found) == [1], "a stage counts its own steps"
    assert abs(found[1][0] - last[0]) < abs(found[1][0] - first[0])
    assert abs(found[1][1] - last[1]) < abs(found[1][1] - first[1])


def test_a_head_of_another_shape_is_refused_in_one_sentence(uninterrupted, digits, tmp_path):
    output = continued(uninterrupted, tmp_path)
    wider = overrides(output, digits, "parallel=single", "objective.pre.head_hidden_ratio=0.5")
    with pytest.raises(RankError, match="cannot go on with objective.pre.head_hidden_ratio=0.5"):
        train(1, wider)
    with pytest.raises(RankError, match="set the options of objective.pre as they were, or start from a checkpoint"):
        train(1, [*wider, f"init_from={output / 'checkpoints'}", f"output_dir={tmp_path / 'new'}"])
