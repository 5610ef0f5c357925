"""The rank's side: one chunk with LaVer, run by hand."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor

from tests.reference import tiny

IMAGES = (2, 1)  # per sample
MASKED = torch.tensor([1, 0, 0, 1, 0, 1, 0, 0, 0, 0, 1, 0]).bool()


def build(laver: bool = True, rope: str = "2d", attention: str = "mixed") -> Any:
    """A chunk on one rank, its teacher installed."""
    import torch.distributed as dist
    from megatron.core import parallel_state as ps
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    from nemo_pre.neva.build import build_neva_config
    from nemo_pre.objectives.laver.term import LaVerTerm
    from nemo_pre.train import prepare_process
    from tests.parity.shape import tiny_run

    run = tiny_run(
        os.devnull,
        {},
        pre=None,
        num_microbatches=1,
        micro_batch_size=len(IMAGES),
        max_steps=1,
        laver={"head_hidden_width": tiny.LAVER_HEAD} if laver else None,
        model={"attention": attention, "rope": rope},
    )
    prepare_process(run)
    if not dist.is_initialized():
        dist.init_process_group("gloo")
        ps.initialize_model_parallel()
    model_parallel_cuda_manual_seed(0)
    config = build_neva_config(run, on_gpu=False)
    if laver:
        LaVerTerm(run.objective.laver).prepare(config)
    torch.manual_seed(0)
    chunk = config.configure_model()
    if laver:
        chunk.laver_teacher.install(chunk.language_model, chunk.laver_head, dist.group.WORLD)
        chunk.laver_teacher.wait()
    return chunk


def run_branch(chunk: Any, batch: dict[str, Any]) -> dict[str, Tensor]:
    """Logits of the samples and states of the branch, image by image."""
    from nemo_pre.objectives.scale import StepPlan
    from nemo_pre.parallel.micro_batch import MicroBatch
    from nemo_pre.parallel.sequence_layout import sequence_layout
    from nemo_pre.parallel.token_streams import VisualBranch, image_rows, packed_images

    layout = sequence_layout(batch["tokens"], chunk.image_tiles(batch["num_media_tiles"], None), -200, tiny.MAX_LENGTH)
    branch = VisualBranch(packed_images(layout, image_rows(layout), 8), MASKED, True)
    found: dict[str, Tensor] = {"image": layout.visual_image_BS, "branch_image": branch.layout.visual_image_BS}

    def listen(chunk: Any, micro_batch: Any, states: Any, output: Tensor) -> Tensor:
        found["student"], found["teacher"] = states.student.detach(), states.teacher
        return output

    chunk.on_branch = [listen]
    plan = StepPlan(1, tiny.MAX_LENGTH)
    with torch.no_grad():
        found["logits"] = chunk(
            input_ids=batch["tokens"],
            position_ids=batch["position_ids"],
            images=batch["media"],
            num_image_tiles=batch["num_media_tiles"],
            micro_batch=MicroBatch(0, plan, layout, branch),
        )
    # [L * B, d] in the order of positions, then rows -> [B, L, d]
    rows = len(IMAGES)
    for name in ("student", "teacher"):
        found[name] = found[name].view(-1, rows, found[name].shape[-1]).transpose(0, 1)
    return found


def change_an_image(number: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    chunk = build()
    batch = tiny.random_batch(IMAGES, seed=3)
    before = run_branch(chunk, batch)
    batch["media"] = batch["media"].clone()
    batch["media"][number] += 1.0
    return before, run_branch(chunk, batch)


def teacher_side_effects() -> dict[str, Any]:
    """What running and moving the teacher does to the student and to random states."""
    from megatron.core.tensor_parallel.random import get_cuda_rng_tracker

    chunk = build()
    student = {n: p.detach().clone() for n, p in chunk.named_parameters() if "teacher" not in n}
    alike = all(
        torch.equal(
            p,
            student[
                n.replace("laver_teacher.decoder", "language_model.decoder").replace(
                    "laver_teacher.head", "laver_head"
                )
            ],
        )
        for n, p in chunk.laver_teacher.named_parameters(prefix="laver_teacher")
    )
    state, tracked = torch.random.get_rng_state(), get_cuda_rng_tracker().get_states()
    run_branch(chunk, tiny.random_batch(IMAGES, seed=3))
    for parameter in chunk.language_model.parameters():
        parameter.data.add_(0.5)
    chunk.laver_teacher.update(0.75)
    chunk.laver_teacher.wait()
    same_state = torch.equal(state, torch.random.get_rng_state())
    same_tracked = all(torch.equal(a, get_cuda_rng_tracker().get_states()[n]) for n, a in tracked.items())
    moved = [
        (p - student[n.replace("laver_teacher.", "language_model.")]).mean().item()
        for n, p in chunk.laver_teacher.named_parameters(prefix="laver_teacher")
        if "decoder" in n
    ]
    chunk.train()
    return {
        "starts as the student": alike,
        "random states": same_state and same_tracked,
        "moved by": moved,
        "trains": [p.requires_grad for p in chunk.laver_teacher.parameters()],
        "in training mode": chunk.laver_teacher.decoder.training,
    }


def late_weights() -> dict[str, list[Tensor]]:
    """The teacher's branch after two updates, where its weights are there at once and where they come when waited for;
    and the first of its weights just after the second update."""
    import torch.distributed as dist

    from nemo_pre.parallel.sharded_average import ShardedAverage

    class Late:
        def __init__(self, average: ShardedAverage, out: Tensor) -> None:
            self.average, self.out = average, out

        def wait(self) -> None:
            dist.all_gather_into_tensor(self.out, self.average.shard, group=self.average.group)

    on_time = ShardedAverage.start_gather
    found: dict[str, list[Tensor]] = {"states": [], "after": []}
    for start_gather in (on_time, lambda average, out: Late(average, out)):
        ShardedAverage.start_gather = start_gather  # type: ignore[assignment, method-assign]
        chunk = build()
        for _ in range(2):
            for parameter in chunk.language_model.parameters():
                parameter.data.mul_(1.5)
            chunk.laver_teacher.update(0.5)
        weight = next(chunk.laver_teacher.parameters())
        found["after"].append(weight.detach().clone())
        found["states"].append(run_branch(chunk, tiny.random_batch(IMAGES, seed=3))["teacher"])
    ShardedAverage.start_gather = on_time  # type: ignore[method-assign]
    return found


def refusal_of_a_causal_layer() -> str:
    """What is said where mixed attention is asked for and the layers have Megatron's own."""
    from nemo_pre.neva.decoder import local_layer_spec

    chunk = build(laver=False)
    config = chunk.config
    config.language_transformer_config.transformer_layer_spec = local_layer_spec
    try:
        config.configure_model()
    except ValueError as error:
        return str(error)
    return "built"


def text_logits() -> dict[str, Tensor]:
    """Text alone, with one-axis positions and with two."""
    batch = tiny.random_batch((0, 0), seed=5)
    answers = {}
    for name, rope, attention in (("1d", "1d", "causal"), ("2d", "2d", "causal"), ("mixed 2d", "2d", "mixed")):
        chunk = build(laver=False, rope=rope, attention=attention)
        with torch.no_grad():
            answers[name] = chunk(input_ids=batch["tokens"], position_ids=batch["position_ids"])
    return answers
