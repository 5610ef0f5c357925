"""Options that no recipe takes, rehearsed: attention backends, packing, features, external anchors, recomputation,
context and interleaved pipelines."""

import json

import pytest

from nemo_pre.compat import versions
from nemo_pre.config.compose import compose_run
from nemo_pre.rehearsal.compare import LEAK
from nemo_pre.rehearsal.everything import rehearse_all
from nemo_pre.rehearsal.run import Wishes, run_rehearsal
from nemo_pre.rehearsal.targets import PROCESSOR

PRE, LAVER = "experiment=digits_tiny_pre", "experiment=digits-laver"
EXTERNAL = {
    "model_type": "dinov2",
    "architectures": ["Dinov2Model"],
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "mlp_ratio": 2,
    "patch_size": 14,
    "image_size": 56,
}
CASES = {
    "split attention": [LAVER, "model.attention_backend=split", "parallel=single"],
    "dense attention, tensor parallelism": [LAVER, "model.attention_backend=dense", "parallel=tp2_sp"],
    "packed rows over context ranks": [PRE, "data.packing=true", "data.sequence_length=256", "parallel=cp2"],
    "causal rows over context ranks": [PRE, "precision=bf16", "parallel=cp2"],
    "features and an external anchor": [
        PRE,
        "data.features=somewhere",
        "optim.freeze_vision=true",
        "objective.pre.anchor=external",
        "objective.pre.external_path=EXTERNAL",
        "parallel=single",
    ],
    "recomputation, a moving anchor, whole images": [
        PRE,
        "parallel.recompute=full",
        "objective.pre.variant=global",
        "objective.pre.ema_momentum=0.9",
        "parallel=single",
    ],
    "an interleaved pipeline": [PRE, "parallel=pp2_vpp2"],
}
# The images of a frozen encoder are held while a micro-batch's backward pass goes on, and so is a recomputed group's
# output.
HELD_LONG = {
    "a frozen encoder in float32": ["experiment=digits_taught"],
    "recomputation in float32": ["experiment=digits_taught", "parallel.recompute=full"],
    "recomputation, interleaved, in FP8": [
        "experiment=digits_tiny",
        "parallel=pp2_vpp2",
        "precision=fp8_delayed",
        "parallel.recompute=full",
    ],
}


@pytest.mark.parametrize("words", CASES.values(), ids=CASES)
def test_an_option_that_no_recipe_takes_is_rehearsed(words, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(EXTERNAL))
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(PROCESSOR))
    config = compose_run([word.replace("EXTERNAL", str(tmp_path)) for word in words])
    found = run_rehearsal(config, Wishes(layers=1, jobs=2))
    assert found.met is None or found.met.problem is None
    for rank in found.found:
        assert len(rank.peaks) == 2 and rank.growth < LEAK and rank.kernels > 0 and all(rank.forward_flops)
    assert [beside for beside in found.besides if beside.over < 0] == []  # no plan is under


@pytest.mark.parametrize("words", HELD_LONG.values(), ids=HELD_LONG)
def test_a_plan_knows_what_is_held_longer_than_it_is_used(words):
    for beside in run_rehearsal(compose_run(words), Wishes(layers=2, jobs=2, messages=False)).besides:
        assert 0 <= beside.over < 0.03, beside.place


def test_the_record_is_of_nemos_training_and_refused_where_there_is_none(monkeypatch, tmp_path):
    monkeypatch.setattr(versions, "installed", lambda package: None)
    with pytest.raises(ValueError, match="rehearses models with NeMo, which is not installed: install the extra nemo"):
        rehearse_all(["digits_tiny"], out=str(tmp_path))
    assert not list(tmp_path.iterdir())
