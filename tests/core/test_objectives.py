"""A loop of one's own is told in one sentence what it forgot, and what a model cannot carry; outside of a step the
model is as it was."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest

from tests.backend import BACKEND, CORE
from tests.ranks import run_ranks
from tests.reference import tiny

pytestmark = pytest.mark.core


def said(call: Callable[[], Any]) -> str:
    try:
        call()
    except ValueError as error:
        return str(error)
    return "nothing"


def start(**options: Any) -> Any:
    from nemo_pre.compat import cpu_backend

    cpu_backend.apply()
    import torch.distributed as dist

    from tests.parity.core_job import start_ranks
    from tests.parity.shape import tiny_run

    run = tiny_run(os.devnull, {}, num_microbatches=1, micro_batch_size=2, max_steps=3, **{"pre": None, **options})
    if not dist.is_initialized():
        start_ranks(run)
    return run


def sentences() -> dict[str, str]:
    """On a rank: what is said of each mistake."""
    import torch
    from megatron.core.distributed import DistributedDataParallelConfig
    from torch import nn

    from nemo_pre.core import Objectives, build_chunks
    from nemo_pre.core.model import model_config, wrap

    run = start(pre={"layers": [2]})
    batch = tiny.random_batch((1, 2), seed=1)
    found = {}
    objectives = Objectives.of_run(run)
    found["no model"] = said(lambda: objectives.start_step([batch]))
    found["no chunk"] = said(lambda: objectives.attach([]))
    found["another model"] = said(lambda: objectives.attach([nn.Linear(2, 2)]))
    chunks = build_chunks(run)
    wrapped = wrap(chunks, DistributedDataParallelConfig())
    found["wrapped"] = said(lambda: objectives.attach(wrapped))
    found["facts of ours"] = said(lambda: objectives.attach(chunks, encoder_width=3))
    objectives.attach(build_chunks(run))
    found["twice"] = said(lambda: objectives.attach(build_chunks(run)))
    found["not installed"] = said(lambda: objectives.start_step([batch]))
    objectives.install()
    found["no step"] = said(objectives.end_step)
    found["nothing to do"] = said(lambda: objectives.start_step([]))
    other = Objectives.of_run(run)
    other.prepare(model_config(run))
    found["prepared for another"] = said(lambda: other.attach(chunks))
    found["a layer too many"] = said(lambda: build_chunks(run, Objectives.of_run(start(pre={"layers": [9]}))))

    laver = start(laver={})
    found["laver, causal"] = said(lambda: build_chunks(laver, Objectives.of_run(laver)))
    mixed = start(laver={}, model={"attention": "mixed"})
    found["laver, too late"] = said(lambda: Objectives.of_run(mixed).attach(build_chunks(mixed)))
    run.parallel.pipeline = 2
    found["another layout"] = said(lambda: build_chunks(run))
    torch.distributed.destroy_process_group()
    return found


def test_what_a_loop_forgot_is_said_in_one_sentence():
    (found,) = run_ranks(sentences, 1)
    expected = {
        "no model": "call Objectives.attach",
        "no chunk": "There is no model chunk",
        "another model": "not a Linear",
        "wrapped": "A DistributedDataParallel wraps the model",
        "facts of ours": "encoder_width",
        "twice": "attached already",
        "not installed": "call Objectives.install()",
        "no step": "call Objectives.start_step",
        "nothing to do": "at least one micro-batch",
        "prepared for another": "prepared for another model",
        "a layer too many": "objective.pre.layers=[9] must name different layers between 1 and",
        "laver, causal": "set model.attention=mixed",
        "laver, too late": "call Objectives.prepare(config) first",
        "another layout": "parallel.pipeline=2, and Megatron's groups were made for 1",
    }
    assert found.keys() == expected.keys()
    for name, words in expected.items():
        assert words in found[name], (name, found[name])
        assert found[name].count(". ") == 0 and found[name].endswith("."), found[name]


def outside_of_a_step() -> dict[str, Any]:
    """On a rank: what a model says before objectives are attached, after, and when they are taken off again."""
    import torch

    from nemo_pre.core import Objectives, build_chunks

    run = start(pre={"layers": [2]})
    batch = tiny.random_batch((1, 2), seed=1)

    def logits() -> torch.Tensor:
        with torch.no_grad():
            answer: torch.Tensor = chunk(
                input_ids=batch["tokens"],
                position_ids=batch["position_ids"],
                images=batch["media"],
                num_image_tiles=batch["num_media_tiles"],
            )
        return answer

    (chunk,) = build_chunks(run)
    said = [logits()]  # transformers hooks its own modules at their first pass
    hooks = [len(module._forward_hooks) for module in chunk.modules()]
    objectives = Objectives.of_run(run)
    objectives.attach([chunk])
    objectives.install()
    said.append(logits())
    heads = sorted(name for name, _ in chunk.named_parameters() if name.startswith("pre_heads."))
    objectives.start_step([batch])
    objectives.forget_step()
    objectives.remove()
    said.append(logits())
    del chunk.pre_heads
    return {
        "same": all(each.equal(said[0]) for each in said),
        "heads": heads,
        "hooks": (hooks, [len(module._forward_hooks) for module in chunk.modules()]),
    }


def test_outside_of_a_step_nobody_listens_and_nothing_but_parameters_stays():
    (found,) = run_ranks(outside_of_a_step, 1)
    layer = "pre_heads.2"
    assert found["heads"] == [f"{layer}.{part}" for part in ("fc1.bias", "fc1.weight", "fc2.bias", "fc2.weight")]
    assert found["same"]
    before, after = found["hooks"]
    assert before == after


def foreign_sentences() -> dict[str, str]:
    """On a rank: what is said of what Megatron-Core's own models cannot carry."""
    from nemo_pre.core import Objectives, build_chunks
    from nemo_pre.core.model import model_config
    from tests.parity import foreign

    run = start(pre={"layers": [2]})
    found = {}

    def llava(**attributes: Any) -> list[Any]:
        (chunk,) = foreign.llava_chunks(model_config(run), run)
        for name, value in attributes.items():
            setattr(chunk, name, value)
        return [chunk]

    laver = start(laver={}, model={"attention": "mixed"})
    found["LaVer on LLaVAModel"] = said(lambda: Objectives.of_run(laver).attach(llava()))
    found["tile tags"] = said(lambda: Objectives.of_run(run).attach(llava(_tile_tags=["<tile>"])))
    found["dynamic resolution"] = said(lambda: Objectives.of_run(run).attach(llava(dynamic_resolution=True)))

    def hybrid(run: Any) -> Any:
        return build_chunks(run, Objectives.of_run(run), foreign.hybrid_config(model_config(run), run))

    found["2D-RoPE on HybridModel"] = said(lambda: hybrid(start(pre={"layers": [2]}, model={"rope": "2d"})))
    found["LaVer on HybridModel"] = said(lambda: hybrid(laver))
    found["a block too many"] = said(lambda: hybrid(start(pre={"layers": [5]})))  # of 4, or 8 of Megatron's

    objectives = Objectives.of_run(run)
    chunks = llava()
    objectives.attach(chunks)
    objectives.install()
    short, long = tiny.random_batch((1, 1), seed=1), tiny.random_batch((1, 1), seed=1, text_length=14)
    objectives.start_step([short])
    found["another micro-batch"] = said(lambda: foreign.llava_forward_step(iter([long]), chunks[0]))
    return found


@pytest.mark.skipif(BACKEND != CORE, reason="Megatron-Core 0.15.3 has no HybridModel: make test-core")
def test_what_a_model_of_megatrons_own_cannot_carry_is_refused_in_one_sentence():
    (found,) = run_ranks(foreign_sentences, 1)
    expected = {
        "LaVer on LLaVAModel": "LaVer needs a model with model.attention=mixed",
        "tile tags": "built with tile_tags",
        "dynamic resolution": "built with dynamic_resolution",
        "2D-RoPE on HybridModel": "A HybridModel takes neither positions of each token",
        "LaVer on HybridModel": "A HybridModel takes neither positions of each token",
        "a block too many": "layers between 1 and 4",
        "another micro-batch": "in the order in which it got them",
    }
    assert found.keys() == expected.keys()
    for name, words in expected.items():
        assert words in found[name], (name, found[name])
        assert found[name].count(". ") == 0 and found[name].endswith("."), found[name]
