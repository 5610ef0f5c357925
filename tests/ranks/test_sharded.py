"""Weights and gradients go into any layout and come back unchanged, names and all."""

from __future__ import annotations

import pytest
import torch

from tests.ranks import run_on_standing_ranks
from tests.ranks.sharded import Shard, assemble
from tests.reference import tiny

LAYOUTS = {
    "one rank": {},
    "TP2": {"tensor": 2},
    "PP2": {"pipeline": 2},
    "PP2 with VPP2": {"pipeline": 2, "virtual_pipeline": 2},
    "DP2": {"data": 2},
    "TP2xPP2 with SP": {"tensor": 2, "pipeline": 2, "sequence": True},
}


def build_chunks(parallel, pre_layers, tie):
    """On a rank: the chunks of the tiny model, without Lightning."""
    import torch.distributed as dist
    from megatron.core import parallel_state as ps

    from nemo_pre.compat import cpu_backend

    cpu_backend.apply()
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

    from nemo_pre.neva.build import build_neva_config
    from nemo_pre.objectives.pre.head import PredictionHeadSpec
    from tests.parity.shape import tiny_run

    run = tiny_run("unused", parallel, None, 1, 1, 1, language={"tie_embeddings": tie})
    dist.init_process_group("gloo")
    virtual = run.parallel.virtual_pipeline
    ps.initialize_model_parallel(run.parallel.tensor, run.parallel.pipeline, virtual)
    model_parallel_cuda_manual_seed(dist.get_rank())
    config = build_neva_config(run, on_gpu=False)
    config.parts["pre_heads"] = PredictionHeadSpec(pre_layers, tiny.WIDTH, 8, tiny.WIDTH, "gelu", False, 0)
    config.tensor_model_parallel_size = run.parallel.tensor
    config.pipeline_model_parallel_size = run.parallel.pipeline
    config.virtual_pipeline_model_parallel_size = virtual
    config.sequence_parallel = run.parallel.sequence
    return [config.configure_model(vp_stage=v if virtual else None) for v in range(virtual or 1)]


def load_and_return(parallel, pre_layers, tie, full):
    from tests.ranks.sharded import gradient_shards, load_full, weight_shards

    chunks = build_chunks(parallel, pre_layers, tie)
    load_full(chunks, full)
    for chunk in chunks:
        for parameter in chunk.parameters():
            parameter.main_grad = -3 * parameter.detach()
    return weight_shards(chunks), gradient_shards(chunks)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("tie", [False, True], ids=["untied", "tied"])
def test_full_tensors_survive_the_layout(layout, tie):
    parallel = LAYOUTS[layout]
    full = tiny.random_state(tiny.tiny_config(pre_layers=(1, 4), tie_embeddings=tie))
    world = parallel.get("tensor", 1) * parallel.get("pipeline", 1) * parallel.get("data", 1)
    ranks = run_on_standing_ranks(load_and_return, world, parallel, (1, 4), tie, full)
    weights, gradients = (assemble(list(side)) for side in zip(*ranks, strict=True))
    assert weights.keys() == full.keys()
    assert all(torch.equal(weights[name], full[name]) for name in full)
    assert all(torch.equal(gradients[name], -3 * full[name]) for name in gradients)
    unused = {name for name in full if name not in gradients}
    assert all(name.startswith("vision_model.") for name in unused)  # behind the feature layer: frozen


def piece(values, start, stop):
    return Shard("w", (4,), ((start, stop),), torch.tensor(values))


def test_copies_that_disagree_are_refused():
    with pytest.raises(AssertionError, match="w: the copy on rank 1 differs by 1"):
        assemble([[piece([1.0, 2, 3, 4], 0, 4)], [piece([1.0, 2, 3, 5], 0, 4)]])


def test_an_element_on_no_rank_is_refused():
    with pytest.raises(AssertionError, match="w: 1 elements are on no rank"):
        assemble([[piece([1.0, 2], 0, 2)], [piece([3.0], 2, 3)]])
