"""Each patch does what its reason says, and is undone exactly."""

from __future__ import annotations

from typing import Any

import pytest

from tests.compat import patch_ranks
from tests.compat.jobs import run_jobs
from tests.ranks import run_ranks


def test_every_patch_reverts_to_the_original_objects():
    (names,) = run_ranks(patch_ranks.apply_and_revert, 1)
    assert len(names) == len(set(names)) >= 15


def test_requests_for_cuda_tensors_are_answered_with_cpu_tensors():
    run_ranks(patch_ranks.cuda_requests, 1)


def test_the_runs_seed_and_timeout_reach_the_ranks():
    (found,) = run_ranks(patch_ranks.seed_and_timeouts, 1)
    assert found == {"seed": 7, "seconds": [77.0, 77.0, 77.0]}


@pytest.fixture(scope="module")
def on_two_ranks() -> dict[str, list[Any]]:
    """By job, what both ranks returned."""
    jobs = {
        "random states": (patch_ranks.random_states, ()),
        "seeds": (patch_ranks.nemo_seeds, ()),
        "dropout": (patch_ranks.dropout_is_replayed, ()),
        "progress": (patch_ranks.rank_zero_prints_progress, ()),  # the last one: it counts Megatron's collective
    }
    return run_jobs(jobs, 2)


def test_forked_random_states_leave_the_default_generator_alone_and_differ_by_tensor_rank(on_two_ranks):
    first, second = on_two_ranks["random states"]
    assert not first["inside"].equal(second["inside"])
    assert not first["more"].equal(second["more"])


def test_nemo_seeds_the_model_parallel_generators(on_two_ranks):
    assert on_two_ranks["seeds"] == [True, True]


def test_recomputation_replays_dropout(on_two_ranks):
    assert max(on_two_ranks["dropout"]) < 1e-14


def test_progress_on_rank_zero_enters_no_collective(on_two_ranks):
    (entered, printed), (_, nothing) = on_two_ranks["progress"]
    assert "forward-backward" in printed
    assert nothing is None
    assert entered == 1  # NeMo's own, after the revert


@pytest.mark.parametrize("adam_w_mode", [True, False])
def test_group_step_adamw_is_torchs(adam_w_mode):
    import torch

    from nemo_pre.compat.cpu_adamw import GroupStepAdamW

    torch.manual_seed(0)
    ours = [torch.randn(7, 3, requires_grad=True), torch.randn(5, requires_grad=True)]
    theirs = [p.detach().clone().requires_grad_() for p in ours]
    options = {"lr": 0.1, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.2}
    groups = [{"params": ours}, {"params": []}]
    optimizer = GroupStepAdamW(groups, **options, adam_w_mode=adam_w_mode)
    reference = (torch.optim.AdamW if adam_w_mode else torch.optim.Adam)(theirs, **options, fused=True)
    slow = [p.detach().double().clone().requires_grad_() for p in ours]
    plain = (torch.optim.AdamW if adam_w_mode else torch.optim.Adam)(slow, **options, foreach=False)
    for step in range(5):
        for p, q, r in zip(ours, theirs, slow, strict=True):
            p.grad = torch.randn_like(p)
            q.grad, r.grad = p.grad.clone(), p.grad.double()
        for each in (optimizer, reference, plain):
            each.step()
        if step == 2:  # through a state dict, as a checkpoint does
            state = optimizer.state_dict()
            optimizer = GroupStepAdamW(groups, **options, adam_w_mode=adam_w_mode)
            optimizer.load_state_dict(state)
    assert all(p.equal(q) for p, q in zip(ours, theirs, strict=True))
    for p, r in zip(ours, slow, strict=True):
        torch.testing.assert_close(p.double(), r, rtol=1e-5, atol=1e-6)
    assert [group["step"] for group in optimizer.param_groups] == [5, 5]


@pytest.mark.parametrize("ranks, in_place, copies", [(1, True, 0), (1, False, 1), (2, True, 1)])
def test_a_rank_alone_sends_itself_nothing(ranks, in_place, copies):
    import torch

    from nemo_pre.compat.cpu_megatron import within

    class Group:
        def size(self):
            return ranks

    calls = []
    output = torch.arange(4.0)
    within(lambda *args, **kwargs: calls.append(kwargs))(
        output, output[: 4 // ranks] if in_place else output.clone(), group=Group(), async_op=True
    )
    assert len(calls) == copies
    assert output.tolist() == [0, 1, 2, 3]
