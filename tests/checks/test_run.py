"""Each rule refuses the run it is about with its sentence, and each option without effect is warned of."""

import pytest

from nemo_pre.checks.memory import estimate_memory
from nemo_pre.checks.run import check_options, check_run
from nemo_pre.config.compose import compose_run
from nemo_pre.data.hub import find_hf_file
from nemo_pre.planner.parameters import model_parameters


def run_with(*overrides, experiment="digits_tiny"):
    return compose_run([f"experiment={experiment}", *overrides])


# Every case breaks exactly one rule of a run that is otherwise accepted (test_compose shows that it is).
REFUSED = [
    (["trainer.spike_action=stop", "trainer.spike_factor=0.5"], "trainer.spike_factor=0.5 must be more than 1."),
    (
        ["trainer.nan_action=roll_back", "resume=false"],
        "A roll-back continues from a checkpoint, which resume=false forbids: leave resume=true.",
    ),
    (
        ["trainer.nan_action=roll_back", "optim.clip_grad=0"],
        "trainer.nan_action=roll_back looks at the gradient's norm, which needs optim.clip_grad above 0.",
    ),
    (["platform=tpu"], "platform=tpu is unknown: choose one of auto, cpu, gpu."),
    (["precision.name=fp64"], "precision.name=fp64 is unknown"),
    (["model.vision.family=dino"], "model.vision.family=dino is unknown"),
    (["model.language.family=gpt"], "model.language.family=gpt is unknown"),
    (["model.projector=conv"], "model.projector=conv is unknown"),
    (["data.chat_template=x"], "data.chat_template=x is unknown"),
    (["data.on_error=ignore"], "data.on_error=ignore is unknown: choose one of raise, skip."),
    (["parallel.recompute=all"], "parallel.recompute=all is unknown"),
    (["objective.pre.variant=x"], "objective.pre.variant=x is unknown: choose one of patch, global."),
    (["objective.pre.anchor=x"], "objective.pre.anchor=x is unknown"),
    (["objective.pre.head_activation=x"], "objective.pre.head_activation=x is unknown"),
    (["objective.pre.schedule.kind=x"], "objective.pre.schedule.kind=x is unknown"),
    (["model.vision.image_mean=[0.5,0.5]"], "model.vision.image_mean=[0.5, 0.5] must be three numbers, of red,"),
    (["model.vision.image_std=[1,0,1]"], "model.vision.image_std=0.0 must be more than 0."),
    (["parallel.tensor=0"], "parallel.tensor=0 must be 1 or more."),
    (["parallel.virtual_pipeline=0"], "parallel.virtual_pipeline=0 must be 1 or more."),
    (["model.language.num_layers=0"], "model.language.num_layers=0 must be 1 or more."),
    (["model.vision.patch_size=0"], "model.vision.patch_size=0 must be 1 or more."),
    (["trainer.micro_batch_size=0"], "trainer.micro_batch_size=0 must be 1 or more."),
    (["trainer.val_every=0"], "trainer.val_every=0 must be 1 or more."),
    (["cluster.nodes=0"], "cluster.nodes=0 must be 1 or more."),
    (["optim.lr=-1"], "optim.lr=-1.0 must be more than 0."),
    (["optim.lr=nan"], "optim.lr=nan is no finite number: it must be more than 0."),
    (["optim.lr_vision=-1"], "optim.lr_vision=-1.0 must be 0 or more."),
    (["optim.warmup_ratio=2"], "optim.warmup_ratio=2.0 must lie between 0 and 1."),
    (["objective.pre.ema_momentum=1.5"], "objective.pre.ema_momentum=1.5 must lie between 0 and 1."),
    (["objective.pre.head_hidden_ratio=0"], "objective.pre.head_hidden_ratio=0.0 must be more than 0."),
    (["model.vision.image_size=50"], "model.vision.image_size=50 must be a multiple of model.vision.patch_size=8."),
    (["model.vision.feature_layer=5"], "model.vision.feature_layer=5 does not exist"),
    (["model.vision.feature_layer=-6"], "model.vision.feature_layer=-6 does not exist"),
    (["model.vision.family=siglip"], "model.vision.family=siglip has no class token"),
    (["model.vision.num_attention_heads=5"], "model.vision.hidden_size=96 must be a multiple of"),
    (["model.language.num_attention_heads=6"], "model.language.hidden_size=128 must be a multiple of"),
    (["model.language.num_query_groups=3"], "model.language.num_attention_heads=4 must be a multiple of"),
    (
        ["optim.freeze_vision=true", "optim.freeze_projector=true", "optim.freeze_language=true"],
        "Nothing would be trained",
    ),
    (["parallel.tensor=3"], "parallel.tensor=3 must divide model.language.num_attention_heads=4."),
    (["parallel.tensor=4"], "parallel.tensor=4 must divide model.language.num_query_groups=2."),
    (
        ["parallel.tensor=2", "model.language.ffn_hidden_size=351"],
        "parallel.tensor=2 must divide model.language.ffn_hidden_size=351.",
    ),
    (
        [
            "parallel.tensor=3",
            "model.language.hidden_size=126",
            "model.language.num_attention_heads=6",
            "model.language.num_query_groups=3",
            "model.language.ffn_hidden_size=351",
        ],
        "parallel.tensor=3 must divide the vocabulary, which is padded to 256.",
    ),
    (["parallel.pipeline=3"], "parallel.pipeline=3 must divide model.language.num_layers=8, or"),
    (["parallel.virtual_pipeline=2"], "parallel.virtual_pipeline=2 needs more than one pipeline stage"),
    (["parallel.pipeline=2", "parallel.virtual_pipeline=1"], "parallel.virtual_pipeline=1 is no interleaving"),
    (
        ["parallel.pipeline=2", "parallel.virtual_pipeline=3"],
        "parallel.pipeline x parallel.virtual_pipeline=6 must divide model.language.num_layers=8, or",
    ),
    (
        ["parallel.recompute=full", "parallel.recompute_num_layers=3"],
        "parallel.recompute_num_layers=3 must divide the 8 layers of a pipeline chunk.",
    ),
    (
        ["parallel.tensor=2", "parallel.sequence=true", "data.sequence_length=97"],
        "data.sequence_length=97 must be a multiple of 2 (parallel.tensor).",
    ),
    (
        ["parallel.context=2", "data.sequence_length=98"],
        "data.sequence_length=98 must be a multiple of 4 (2 x parallel.context).",
    ),
    (
        ["parallel.context=2", "parallel.tensor=2", "parallel.sequence=true", "data.sequence_length=100"],
        "data.sequence_length=100 must be a multiple of 8 (2 x parallel.context x parallel.tensor).",
    ),
    (
        ["data.sequence_length=37"],
        "data.sequence_length=37 leaves no room for text beside an image of 36 visual tokens",
    ),
    (["trainer.global_batch_size=33"], "trainer.global_batch_size=33 must be a multiple of 4 "),
    (["parallel.data=8"], "trainer.global_batch_size=16 must be a multiple of 32 "),
    (
        ["parallel=pp2_vpp2", "trainer.global_batch_size=12"],
        "parallel.virtual_pipeline needs a number of micro-batches that is a multiple of parallel.pipeline=2, not 3",
    ),
    (
        ["objective=pre", "objective.pre.layers=[0]"],
        "objective.pre.layers=[0] must name different layers between 1 and 8",
    ),
    (["objective=pre", "objective.pre.layers=[9]"], "objective.pre.layers=[9] must name different layers"),
    (["objective=pre", "objective.pre.layers=[8,-1]"], "objective.pre.layers=[8, -1] must name different layers"),
    (["objective=pre", "objective.pre.layers=[]"], "objective.pre.layers=[] must name different layers"),
    (
        ["objective=pre", "objective.pre.anchor=external"],
        "objective.pre.anchor=external needs objective.pre.external_path",
    ),
    (
        ["objective=pre", "objective.pre.anchor=pre_projector", "objective.pre.ema_momentum=0.9"],
        "objective.pre.ema_momentum averages the projector and needs objective.pre.anchor=pre_llm, not pre_projector.",
    ),
    (["cluster.nodes=2"], "The layout's 1 ranks cannot be divided among cluster.nodes=2"),
    (
        ["cluster=h100_node"],
        "The layout has 1 ranks (tensor x pipeline x context x data) but the cluster 1 x 8 devices",
    ),
    (["platform=gpu"], "platform=gpu, but this machine shows no NVIDIA GPU"),
]


@pytest.mark.parametrize(("overrides", "sentence"), REFUSED, ids=[" ".join(case[0]) for case in REFUSED])
def test_a_run_that_cannot_work_is_refused(overrides, sentence):
    with pytest.raises(ValueError) as refusal:
        check_options(run_with(*overrides))
    text = str(refusal.value)
    assert text.startswith(sentence)
    assert text.endswith(".")
    assert "\n" not in text


WARNED = [
    (
        ["parallel.overlap_grad_reduce=true"],
        "parallel.overlap_grad_reduce has no effect with parallel.data=1 and parallel.context=1.",
    ),
    (["parallel.sequence=true"], "parallel.sequence has no effect with parallel.tensor=1."),
    (["parallel.recompute_num_layers=2"], "parallel.recompute_num_layers has no effect with parallel.recompute=none."),
    (
        ["optim.freeze_vision=true", "optim.lr_vision=1e-4"],
        "optim.lr_vision has no effect with optim.freeze_vision=true.",
    ),
    (["objective.pre.weight=0.7"], "objective.pre.weight have no effect with objective.pre.enabled=false."),
    (
        ["trainer.rank_timeout=600"],
        "trainer.hang_timeout=1800 has no effect where trainer.rank_timeout=600 ends waiting ranks before.",
    ),
    (
        ["optim.lr_heads=1e-4"],
        "optim.lr_heads has no effect without an objective that has heads, such as objective.pre.",
    ),
    (
        ["objective=pre", "objective.pre.external_path=x"],
        "objective.pre.external_path, external_image_size and external_features have no effect with "
        "objective.pre.anchor=pre_llm.",
    ),
    (
        ["objective=pre", "objective.pre.schedule.steps=5"],
        "objective.pre.schedule.start and steps have no effect with objective.pre.schedule.kind=constant.",
    ),
    (
        ["objective=pre", "objective.pre.schedule.kind=linear"],
        "objective.pre.schedule.kind=linear has no effect with objective.pre.schedule.steps=0.",
    ),
]


@pytest.mark.parametrize(("overrides", "warning"), WARNED, ids=[" ".join(case[0]) for case in WARNED])
def test_an_option_without_effect_is_warned_of(overrides, warning):
    assert check_options(run_with(*overrides)) == [warning]


def test_a_layout_larger_than_the_machine_is_refused_only_where_it_would_start(monkeypatch):
    monkeypatch.setattr("nemo_pre.checks.run.visible_gpus", lambda: 1)
    monkeypatch.setattr("nemo_pre.checks.run.uses_gpu", lambda platform: platform != "cpu")
    with pytest.raises(
        ValueError, match=r"The layout has 2 ranks but this machine 1 GPU\(s\): choose a smaller layout"
    ):
        check_options(run_with("parallel=pp2"))
    check_options(run_with("parallel=pp2", "platform=cpu"))
    check_options(run_with("parallel=pp2", "dry_run=true"))
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    check_options(run_with("parallel=pp2"))


# --- what lies on disk ----------------------------------------------------------------------------------------------


def test_missing_data_is_refused_with_the_command_that_prepares_it(tmp_path):
    with pytest.raises(ValueError, match=r"data.path=.* has no manifest.json: .*nemo-pre data demo"):
        check_run(run_with(f"data.path={tmp_path}"))


def test_a_checked_run_is_summarised(monkeypatch):
    monkeypatch.setattr("nemo_pre.checks.run.check_presence", lambda *_: "somewhere")
    report = check_run(run_with("objective.pre.layers=[-1]", experiment="digits_tiny_pre"))
    summary = report.summary()
    assert "2 rank(s) on CPU: TP1 x PP2 x CP1 x DP1, fp32" in summary
    assert "4 micro-batches of 4" in summary
    assert "PRe at layer 8, weight 0.5" in summary
    assert "with activations, of" in summary


@pytest.mark.parametrize(
    ("source", "sentence"),
    [
        ("/nowhere/tower", "model.tokenizer=/nowhere/tower does not exist"),
        ("./nowhere", "model.tokenizer=./nowhere does not exist"),
        ("nobody/no-such-tower", r"nor in the hub's cache, and cannot be fetched \(HF_HUB_OFFLINE is set\)"),
    ],
)
def test_a_tokenizer_out_of_reach_is_refused(source, sentence):
    with pytest.raises(ValueError, match=sentence):
        find_hf_file("model.tokenizer", source, "config.json")


def test_a_former_stage_that_is_not_there_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("nemo_pre.checks.data.check_data", lambda path, vocab_size: Manifest())
    with pytest.raises(ValueError, match="init_from=.* is not a directory: train the former stage, or import"):
        check_run(run_with(f"init_from={tmp_path / 'nothing'}"))


class Manifest:
    tokenizer = "tokenizer"
    dataset = "digits"
    shards: dict = {}


# --- memory ---------------------------------------------------------------------------------------------------------


LAST_VISION_NORM = 2 * 96  # behind the features: it is never trained


def test_bytes_follow_precision_frozen_parts_and_the_distributed_optimizer():
    whole = sum(model_parameters(run_with()).values())
    assert estimate_memory(run_with()).bytes_per_rank == 16 * whole - 12 * LAST_VISION_NORM
    assert estimate_memory(run_with("precision=bf16")).bytes_per_rank == 18 * whole - 16 * LAST_VISION_NORM
    assert estimate_memory(run_with("parallel=dp2")).bytes_per_rank == 12 * whole - 8 * LAST_VISION_NORM
    one_copy = run_with("parallel=dp2", "parallel.distributed_optimizer=false")
    assert estimate_memory(one_copy).bytes_per_rank == 16 * whole - 12 * LAST_VISION_NORM
    vision = model_parameters(run_with())["vision"]
    assert estimate_memory(run_with("optim.freeze_vision=true")).bytes_per_rank == 16 * whole - 12 * vision


def test_the_first_stage_carries_the_vision_tower():
    parts, final_norm = model_parameters(run_with()), 128
    held = parts["vision"] + parts["projector"] + parts["embedding"] + (parts["decoder"] - final_norm) // 2
    assert estimate_memory(run_with("parallel=pp2")).rank_parameters == held


def test_a_model_that_cannot_fit_is_refused(monkeypatch):
    monkeypatch.setattr("nemo_pre.checks.run.check_presence", lambda *_: "")
    with pytest.raises(ValueError, match="A rank of pipeline stage 1 needs about .* GiB .*ignore_memory_estimate"):
        check_run(run_with("model=llava15_7b", "data.sequence_length=1024", "model.language.num_layers=3200"))
