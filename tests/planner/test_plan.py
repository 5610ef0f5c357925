"""The verb: tables, JSON, its own options, calibration, and the sentence for ``train``."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace

import pytest

from nemo_pre.checks.memory import estimate_memory
from nemo_pre.checks.run import check_run
from nemo_pre.config.compose import compose_run
from nemo_pre.config.derived import fp8_recipe
from nemo_pre.objectives.laver import LaVer
from nemo_pre.planner.activations import LayerActivations
from nemo_pre.planner.devices import DEVICES, Efficiency
from nemo_pre.planner.flops import Flops, model_flops
from nemo_pre.planner.load import largest_load
from nemo_pre.planner.memory import rank_memory, state_memory
from nemo_pre.planner.parameters import layer_parameters
from nemo_pre.planner.plan import plan_layout
from nemo_pre.planner.step_time import calibrated, pass_seconds, step_time
from nemo_pre.verbs.plan import plan, plan_help, read_options
from tests.composed import experiment
from tests.planner.shapes import llama3_70b

H100, ASSUMED = DEVICES["h100"], Efficiency()
LAVER = "experiment=siglip2_qwen25_7b_laver_stage2_knowledge_pre"


def test_it_prints_what_a_run_needs_and_writes_the_same_as_json(tmp_path, capsys) -> None:
    out = tmp_path / "plan.json"
    plan([LAVER, "cluster.gpus=64", "cluster.gpu=h200", f"json={out}"])
    text, written = capsys.readouterr().out, json.loads(out.read_text())
    assert "never checked on a GPU" in text and written["measured_on_a_gpu"] is False
    assert written["gpu"] == "h200" and written["layout"]["data"] == 32  # the recipe's TP2, on 64 GPUs
    assert {"teacher", "LaVer heads", "vision"} <= set(written["flops_per_step"])
    fullest = max(stage["bytes"] for stage in written["stages"].values())
    assert f"with {fullest / 1e9:.1f} GB" in text
    assert len(written["search"]["best"]) == 5 and "best of" in text
    days, hours = written["time"]["days"], written["time"]["gpu_hours"]
    assert hours == pytest.approx(days * 24 * 64)
    assert sum(written["stages"]["1"]["by_kind"].values()) == written["stages"]["1"]["bytes"]


def test_a_layout_that_cannot_be_is_named_and_still_searched(capsys) -> None:
    plan(["experiment=siglip2_qwen25_7b_stage2_full", "parallel=tp8_pp4_sp", "cluster.gpus=32"])
    text = capsys.readouterr().out
    assert "This layout cannot be: TP8 does not divide 28 attention heads." in text
    assert "best of" in text


def test_it_imports_neither_torch_nor_megatron() -> None:
    script = (
        "import sys\nfrom nemo_pre.verbs.plan import plan\n"
        "plan(['experiment=llava15_7b_stage2_full'])\n"
        "assert not {'torch', 'megatron', 'nemo', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", script], check=True, capture_output=True)


def test_every_word_is_the_planners_or_the_runs() -> None:
    overrides, options = read_options(["experiment=x", "cluster.gpus=64", "efficiency.matrix=0.4", "best=2"])
    assert overrides == ["experiment=x"]
    assert (options.gpus, options.best, options.efficiency.matrix) == (64, 2, 0.4)
    for words, sentence in (
        (["--json"], "not an option"),
        (["cluster.gpus=many"], "not a whole number"),
        (["cluster.gpus=0"], "must be between 1 and 1,000,000"),
        (["efficiency.matrix=2"], "at most 1"),
    ):
        with pytest.raises(ValueError, match=sentence):
            read_options(words)
    with pytest.raises(ValueError, match="cluster.gpu=v100 is unknown"):
        plan(["experiment=llava15_7b_stage2_full", "cluster.gpu=v100"])
    assert "cluster.gpus=N" in plan_help()


def test_calibration_explains_the_measured_step(tmp_path) -> None:
    config = compose_run(["experiment=llava15_7b_stage2_full"])
    load = largest_load(config)
    slow = replace(ASSUMED, matrix=0.37)
    metrics = tmp_path / "metrics.jsonl"
    seconds = step_time(config, load, H100, slow).seconds
    metrics.write_text("".join(json.dumps({"step": n, "step_time": seconds}) + "\n" for n in range(3)))
    assert calibrated(config, load, H100, ASSUMED, metrics).matrix == pytest.approx(0.37, rel=1e-6)
    metrics.write_text('{"step": 1}\n')
    with pytest.raises(ValueError, match="names no step's time"):
        calibrated(config, load, H100, ASSUMED, metrics)


def test_a_70b_step_is_six_operations_per_parameter_and_token() -> None:
    """And attention's on top: arXiv 2001.08361, section 2.1."""
    config = llama3_70b()
    load = largest_load(config)
    parts = model_flops(config, load)
    matrices = 80 * (2 * 8192**2 + 2 * 8192 * 1024 + 3 * 8192 * 28672) + 128256 * 8192
    tokens = config.trainer.global_batch_size * config.data.sequence_length
    assert parts["decoder matrices"] + parts["logits"] == pytest.approx(6 * matrices * tokens)
    attention = 80 * 12 * 8192 * 1024 * 2048 * 2049 / 2
    assert parts["decoder attention"] == pytest.approx(attention)


def test_utilization_never_exceeds_the_assumed_efficiency() -> None:
    config = llama3_70b()
    time = step_time(config, largest_load(config), H100, ASSUMED)
    assert 0.2 < time.utilization(H100) < ASSUMED.matrix
    assert time.seconds == pytest.approx(time.pipeline + time.gradients + time.optimizer)


def test_the_teachers_weights_are_moved_and_gathered_by_hand() -> None:
    """TP2 x DP8 on two nodes of eight: four replicas' ranks share a node's adapters."""
    config = compose_run([LAVER])
    assert (config.parallel.tensor, config.parallel.data) == (2, 8)
    averaged = 28 * layer_parameters(config, 2) + 3584 + LaVer(config).build_cost().head_parameters()
    ready = replace(ASSUMED, bandwidth=1.0)
    gather = averaged * 2 * 7 / 8 / (4 * 50e9)
    move = averaged / 8 * 10 / 3350e9
    load = largest_load(config)
    assert sum(step_time(config, load, H100, ready).objectives.values()) == pytest.approx(move + gather)
    config.objective.laver.update_every = 10
    assert sum(step_time(config, load, H100, ready).objectives.values()) == pytest.approx((move + gather) / 10)
    config.objective.laver.teacher_memory = "gathered"
    micro_batches = config.trainer.global_batch_size // config.trainer.micro_batch_size // 8
    assert sum(step_time(config, load, H100, ready).objectives.values()) == pytest.approx(
        move / 10 + gather * micro_batches
    )


def test_fp8_halves_the_time_of_the_layers_that_have_it_and_keeps_copies_of_their_weights() -> None:
    bf16, fp8 = compose_run(["experiment=llava15_7b_stage2_full"]), compose_run(["experiment=llava15_7b_stage2_full"])
    fp8.precision.name, layers = "fp8_tensorwise", range(32)
    load = largest_load(bf16)
    parts = {"decoder matrices": Flops(1e15, 2e15)}
    alone = replace(ASSUMED, matrix=1.0)
    [(slow, _)] = [pass_seconds(bf16, load, parts, layers, replace(H100, nvlink=1e30), alone)]
    [(fast, _)] = [pass_seconds(fp8, load, parts, layers, replace(H100, nvlink=1e30), alone)]
    assert fast == pytest.approx(slow * (2 + 30 * 989 / 1979) / 32)  # one layer at each end stays bf16
    assert not state_memory(bf16, 0)["FP8 copies"] and fp8.parallel.tensor == 2
    linear = 4096 * (3 * 4096 + 4096 + 3 * 11008) // 2  # no norm's weights
    assert state_memory(fp8, 0)["FP8 copies"] == 2 * 30 * linear
    fp8.precision.name = "fp8_blockwise"
    blocks = 2 * 48 * 32 + 2 * 32 * 16  # of 128 x 128: query, key and value 6144 x 4096; the projection 4096 x 2048
    blocks += 86 * 32 + 32 * 88  # gate and value, 11008 x 4096, and its transpose, in lines of multiples of 4
    blocks += 32 * 44 + 43 * 32  # the last one, 4096 x 5504, and its transpose
    assert state_memory(fp8, 0)["FP8 copies"] == 2 * 30 * linear + 30 * 4 * blocks
    with pytest.raises(ValueError, match="needs FP8, which a100 lacks"):
        step_time(fp8, load, DEVICES["a100"], ASSUMED)


def test_heads_run_at_tf32s_rate_in_bf16_runs_and_gram_matrices_at_float32s() -> None:
    """A float32 run has one rate for all: its own units'."""
    config = compose_run([LAVER])
    load, alone = largest_load(config), replace(ASSUMED, matrix=1.0)
    names = ("decoder matrices", "PRe heads", "LaVer heads", "LaVer Gram matrices")
    parts = dict.fromkeys(names, Flops(1e15, 2e15))
    no_links = replace(H100, nvlink=1e30, network=1e30)
    forward, backward = pass_seconds(config, load, parts, range(0), no_links, alone)
    assert forward == pytest.approx(1e15 / H100.bf16 + 2e15 / H100.tf32 + 1e15 / H100.fp32)
    assert backward == pytest.approx(2 * forward)
    config.precision.name = "fp32"
    assert pass_seconds(config, load, parts, range(0), no_links, alone)[0] == pytest.approx(4e15 / H100.fp32)


def test_a_layers_backward_pass_gathers_its_inputs_again_under_sequence_parallelism() -> None:
    """Six operations, four gathers and two scatters, where forward are four; all-reduces are four both ways, and
    nothing is gathered again for weights that have no gradient."""
    words = ["experiment=siglip2_qwen25_72b_stage2_full_pre", "parallel=tp8_pp4_sp", "parallel.recompute=none"]
    config = compose_run(words)
    load, layers = largest_load(config), range(10)
    operation = LayerActivations(config, load, fused=True).whole_input * 7 / 8 / H100.nvlink / ASSUMED.bandwidth
    for sequence, frozen, operations in ((True, False, 6), (False, False, 4), (True, True, 4)):
        config.parallel.sequence, config.optim.freeze_language = sequence, frozen
        forward, backward = pass_seconds(config, load, {"decoder matrices": Flops()}, layers, H100, ASSUMED)
        assert forward == pytest.approx(10 * 4 * operation)
        assert backward == pytest.approx(10 * operations * operation)


def test_fused_layers_keep_less_than_unfused_ones_and_recomputed_layers_less_still() -> None:
    config = compose_run(["experiment=llava15_7b_stage2_frozen"])
    kept = {}
    for recompute in ("none", "full"):
        config.parallel.recompute = recompute
        kept[recompute] = sum(rank_memory(config, largest_load(config), 0, fused=True).activations.values())
    assert kept["full"] < 0.3 * kept["none"]
    config.parallel.recompute = "none"
    assert kept["none"] < sum(rank_memory(config, largest_load(config), 0, fused=False).activations.values())


def test_fused_attention_that_is_recomputed_keeps_more_than_one_that_is_not() -> None:
    """Megatron's checkpoint keeps values as a view of all that the projection made, queries and keys before they were
    turned among it; the kernel a copy of the values, its output (which the projection keeps too) and statistics."""
    config = compose_run(["experiment=llava15_7b_stage2_frozen"])
    load = largest_load(config)
    layer = LayerActivations(config, load, fused=True)
    more = layer.fused_qkv - layer.key - layer.statistics + 4
    assert layer.without_attention - layer.everything == more > 0


@pytest.mark.parametrize(
    ("precision", "per_token"),
    [
        ("bf16", 2 * (2 + 2) * 4096 + 4 * 2 * 4096 + 3 * 2 * 11008),
        # Of norms' and SwiGLU's output a byte; the attention's, in bf16, once more in FP8.
        ("fp8_delayed", 2 * (2 + 1) * 4096 + (4 * 2 + 1) * 4096 + (2 * 2 + 1) * 11008),
        ("fp8_tensorwise", 2 * (2 + 1) * 4096 + 4 * 2 * 4096 + (2 * 2 + 1) * 11008),
        # And a float32 for 128 tokens.
        ("fp8_blockwise", 2 * (2 + 1 + 1 / 32) * 4096 + 4 * 2 * 4096 + (2 * 2 + 1 + 1 / 32) * 11008),
    ],
)
def test_a_layer_keeps_of_a_token_what_transformer_engines_functions_save(precision: str, per_token: float) -> None:
    config = compose_run(["experiment=llava15_7b_stage2_frozen", f"precision={precision}", "parallel=dp8"])
    load = largest_load(config)
    statistics = 2 * 4 + 4 * 32  # of two norms, and of the attention of each head
    kept = LayerActivations(config, load, True, fp8_recipe(config.precision)).everything
    assert kept == load.tokens * (per_token + statistics)


def test_a_run_that_cannot_fit_is_told_what_it_needs_and_one_that_fits_nothing() -> None:
    assert estimate_memory(compose_run(["experiment=llava15_7b_stage2_full"])).problem() is None
    too_large = compose_run(["experiment=llava15_7b_stage2_full", "trainer.micro_batch_size=32"])
    sentence = estimate_memory(too_large).problem()
    assert sentence is not None and "and has 68.5 GiB" in sentence and "activations, decoder" in sentence
    assert "ignore_memory_estimate=true" in sentence


def test_train_refuses_a_run_that_cannot_fit_unless_told_otherwise(monkeypatch) -> None:
    words = ["experiment=llava15_7b_stage2_full", "trainer.micro_batch_size=32", "trainer.global_batch_size=256"]
    monkeypatch.setattr("nemo_pre.checks.run.check_presence", lambda *_: "not looked at")
    with pytest.raises(ValueError, match="A rank of pipeline stage 1 needs about .* GiB"):
        check_run(compose_run(words))
    report = check_run(compose_run([*words, "trainer.ignore_memory_estimate=true"]))
    assert any("needs about" in warning for warning in report.warnings)
    with pytest.raises(ValueError, match="of this machine's memory.* finds no NVIDIA GPU here.* where there are GPUs"):
        check_run(compose_run(words[:1]))  # on a login node, whatever the cluster has
    check_run(compose_run([words[0], "dry_run=true"]))


def test_the_plan_of_every_recipe_can_be_made() -> None:
    import recipes

    for name in recipes.choices("experiment"):
        config = experiment(name)
        made = plan_layout(config, H100, ASSUMED)
        assert made.problem is None and made.time is not None and made.fullest[1].total > 0


@pytest.mark.parametrize(
    "words, width",
    [
        (["experiment=digits_tiny"], 64 - 36 + 1),  # the image's token among them
        (["experiment=aimv2native_qwen25_7b_laver_stage3_instruct"], 2048 - 16 + 1),  # the smallest image's room
        (["experiment=digits_tiny", "data.packing=true"], 64),
    ],
)
def test_text_is_as_wide_as_its_batch_pads_it(words: list[str], width: int) -> None:
    assert largest_load(compose_run(words)).text_width == width
