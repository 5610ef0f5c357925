"""The planner against the product's own trainer on CPU ranks: parameters, what autograd keeps, FLOPs."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest

from nemo_pre.config.derived import world_size
from nemo_pre.config.run import RunConfig
from nemo_pre.planner.flops import stage_flops
from nemo_pre.planner.load import Load, largest_load
from nemo_pre.planner.memory import rank_activations, state_memory
from nemo_pre.planner.parameters import rank_parameters, trainable_parameters
from tests.planner.measured import Measured, measure
from tests.planner.shapes import LAVER, MIXED, tiny
from tests.ranks import run_on_standing_ranks
from tests.reference.tiny import NATIVE

FREEZE_ALL_BUT_PROJECTOR = {"optim.freeze_vision": True, "optim.freeze_language": True}
VIRAL = {"target": "encoder", "head_hidden_width": 24}
WHOLE = {**LAVER, "sequence": "whole", "gram_scope": "micro_batch", "centring": True}
RUNS: dict[str, dict[str, Any]] = {
    "plain": {},
    "frozen": {"changes": FREEZE_ALL_BUT_PROJECTOR},
    "features, PP2": {
        "changes": {"optim.freeze_vision": True, "data.features": "not read: the batches are made"},
        "parallel": {"pipeline": 2},
        "micro_batches": 4,
        "pre": {"anchor": "pre_projector"},
    },
    "as many groups as heads, bf16": {"language": {"num_query_groups": 4}, "precision": "bf16"},
    "siglip": {"changes": {"model.vision.family": "siglip", "model.vision.drop_class_token": False}},
    "dinov2": {"changes": {"model.vision.family": "dinov2"}},
    "aimv2, bf16": {
        "changes": {"model.vision.family": "aimv2", "model.vision.drop_class_token": False},
        "precision": "bf16",
    },
    "patch MLP": {
        "changes": {
            "model.vision.family": "patch_mlp",
            "model.vision.num_layers": 0,
            "model.vision.feature_layer": -1,
            "model.vision.drop_class_token": False,
        }
    },
    "native resolution, bf16": {
        "vision": NATIVE["qwen25_vl"],
        "precision": "bf16",
        "pre": {"anchor": "pre_projector"},
    },
    "AIMv2 at native resolution": {"vision": NATIVE["aimv2_native"], "pre": {"anchor": "pre_projector"}},
    "AIMv2 at native resolution, bf16": {"vision": NATIVE["aimv2_native"], "precision": "bf16"},
    "packed": {"changes": {"data.packing": True}, "images": 3, "pre": {}},
    "packed, TP2+SP, selective": {
        "changes": {"data.packing": True},
        "images": 3,
        "parallel": {"tensor": 2, "sequence": True, "recompute": "selective"},
        "pre": {"variant": "global"},
    },
    "packed, CP2, LaVer": {
        "changes": {"data.packing": True},
        "images": 3,
        "parallel": {"context": 2},
        "model": MIXED,
        "laver": LAVER,
    },
    "packed, PP2, full": {
        "changes": {"data.packing": True},
        "images": 3,
        "parallel": {"pipeline": 2, "recompute": "full"},
        "micro_batches": 4,
    },
    "selective": {"parallel": {"recompute": "selective"}, "language": {"num_query_groups": 4}},
    "full, tied, qwen2": {
        "parallel": {"recompute": "full", "recompute_num_layers": 2},
        "language": {"family": "qwen2", "tie_embeddings": True},
    },
    "PRe on two layers, pooled": {"pre": {"layers": [1, -1], "variant": "global", "head_norm": True}},
    "PRe on two layers, normed, bf16": {"pre": {"layers": [1, -1], "head_norm": True}, "precision": "bf16"},
    "VIRAL on two layers": {"viral": {**VIRAL, "layers": [1, 2], "shared_head": False}},
    "VIRAL, relational, TP2+SP, bf16": {
        "parallel": {"tensor": 2, "sequence": True},
        "viral": {**VIRAL, "form": "similarity"},
        "images": 2,
        "precision": "bf16",
    },
    "VIRAL, relational, hidden states, bf16, full": {
        "viral": {**VIRAL, "form": "similarity", "compared": "hidden"},
        "precision": "bf16",
        "parallel": {"recompute": "full"},
    },
    "VIRAL, PRe, PP2": {"parallel": {"pipeline": 2}, "micro_batches": 4, "viral": {**VIRAL, "layers": [4]}, "pre": {}},
    "LaVer, bf16": {"model": MIXED, "laver": LAVER, "precision": "bf16"},
    "LaVer on whole samples, PRe, selective": {
        "model": MIXED,
        "laver": WHOLE,
        "pre": {"ema_momentum": 0.9},
        "parallel": {"recompute": "selective"},
    },
    "TP2": {"parallel": {"tensor": 2}},
    "TP2+SP, full, bf16": {"parallel": {"tensor": 2, "sequence": True, "recompute": "full"}, "precision": "bf16"},
    "TP2+SP, LaVer, PRe": {"parallel": {"tensor": 2, "sequence": True}, "model": MIXED, "laver": LAVER, "pre": {}},
    "CP2, PRe, bf16": {"parallel": {"context": 2}, "pre": {}, "precision": "bf16"},
    "CP2, LaVer, PRe": {"parallel": {"context": 2}, "model": MIXED, "laver": LAVER, "pre": {}},
    "CP2, selective": {"parallel": {"context": 2, "recompute": "selective"}},
    "PP2, PRe": {"parallel": {"pipeline": 2}, "micro_batches": 4, "pre": {"layers": [2, 3]}},
    "PP2 x VPP2": {"parallel": {"pipeline": 2, "virtual_pipeline": 2}, "micro_batches": 4},
    "PP2, full, LaVer": {
        "parallel": {"pipeline": 2, "recompute": "full"},
        "micro_batches": 4,
        "model": MIXED,
        "laver": LAVER,
    },
    "PP2 x VPP2, selective, LaVer, pooled PRe": {
        "parallel": {"pipeline": 2, "virtual_pipeline": 2, "recompute": "selective"},
        "micro_batches": 4,
        "model": MIXED,
        "laver": LAVER,
        "pre": {"variant": "global"},
        "length": 32,
    },
    "PP2 of 1 and 3 layers, PRe": {
        "parallel": {"pipeline": 2, "pipeline_layers": [1, 3]},
        "micro_batches": 4,
        "pre": {"layers": [1, 2]},
    },
    "PP2 x VPP2 of 1, 2, 2 and 1 layers, full": {
        "parallel": {"pipeline": 2, "virtual_pipeline": 2, "pipeline_layers": [1, 2, 2, 1], "recompute": "full"},
        "language": {"num_layers": 6},
        "micro_batches": 4,
        "pre": {},
    },
    "DP2": {"parallel": {"data": 2, "distributed_optimizer": True}, "precision": "bf16"},
}


class Run(NamedTuple):
    """``load``: the micro-batch all ranks were given."""

    config: RunConfig
    load: Load
    ranks: list[Measured]


def number_of_ranks(name: str) -> int:
    return world_size(tiny(parallel=RUNS[name].get("parallel", {})).parallel)


# By their number of ranks: ranks that stand take the next job of that number.
@pytest.fixture(scope="module", params=sorted(RUNS, key=number_of_ranks))
def run(request: pytest.FixtureRequest) -> Run:
    words = dict(RUNS[request.param])
    images = words.pop("images", 1)
    config = tiny(**words)
    return Run(
        config,
        largest_load(config, images),
        run_on_standing_ranks(measure, world_size(config.parallel), config, images),
    )


def stage_of(config: RunConfig, rank: int) -> int:
    return rank if config.parallel.pipeline > 1 else 0


def test_parameters_and_trainable_ones_of_every_rank_are_those_of_the_built_model(run):
    config, ranks = run.config, run.ranks
    for rank, measured in enumerate(ranks):
        planned = rank_parameters(config, stage_of(config, rank))
        built = measured.parameters
        assert planned["vision"] == built.get("vision_model", 0)
        assert planned["projector"] == built.get("vision_projection", 0)
        assert planned["embedding"] == built.get("embedding", 0)
        assert planned["decoder"] == built.get("decoder", 0)
        assert planned["output"] == built.get("output_layer", 0)
        assert planned.get("pre", 0) == built.get("pre_heads", 0)
        assert planned.get("viral", 0) == built.get("viral_head", 0) + built.get("viral_heads", 0)
        assert planned.get("laver", 0) == built.get("laver_head", 0) + built.get("laver_mask_token", 0)
        assert sum(trainable_parameters(config, planned).values()) == measured.trainable


def test_activations_are_what_autograd_keeps_within_5_percent_and_never_less(run):
    config, ranks = run.config, run.ranks
    for rank, measured in enumerate(ranks):
        planned, _ = rank_activations(config, run.load, stage_of(config, rank), fused=False)
        print("RATIO", sum(planned.values()) / measured.saved_bytes)
        assert measured.saved_bytes <= sum(planned.values()) <= 1.05 * measured.saved_bytes


def test_weights_gradients_optimizer_and_teacher_take_what_was_planned(run):
    config, ranks = run.config, run.ranks
    for rank, measured in enumerate(ranks):
        planned = state_memory(config, stage_of(config, rank))
        for kind, size in measured.state.items():
            assert size == pytest.approx(planned.get(kind, 0), rel=0.02), kind


def test_flops_of_all_ranks_together_are_the_counted_ones(run):
    config, ranks = run.config, run.ranks
    layout, trainer = config.parallel, config.trainer
    micro_batches = trainer.global_batch_size // trainer.micro_batch_size // layout.data
    planned = sum(
        flops.total
        for stage in range(layout.pipeline)
        for chunk in stage_flops(config, run.load, stage, dense=True)
        for flops in chunk.values()
    )
    copies = layout.tensor * layout.context * layout.data
    assert sum(measured.flops for measured in ranks) == pytest.approx(micro_batches * copies * planned, rel=1e-9)
