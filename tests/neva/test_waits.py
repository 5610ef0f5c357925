"""The host never waits for the device inside the passes of a step: whole models run on one that has no values.

What Megatron asks it is listed in docs/performance.md, and none of it belongs to a single rank's passes.
"""

from __future__ import annotations

import pytest
import torch

from tests.neva.waits_ranks import strided_gradients_of, waits_of
from tests.ranks import run_ranks
from tests.reference.tiny import LAVER_HEAD, NATIVE
from tests.waits import DEVICE, Waits, no_waits

MIXED = {"attention": "mixed", "rope": "2d"}
LAVER = {"head_hidden_width": LAVER_HEAD, "mask_schedule": "constant", "mask_ratio": 0.5}
CASES = {
    "NeVA": {},
    "PRe": {"pre": {"layers": [1, 2]}, "similarity": True},
    "PRe of whole images": {"pre": {"variant": "global"}},
    "PRe's moving anchor": {"pre": {"ema_momentum": 0.9}},
    "PRe, recomputed": {"pre": {}, "changes": {"parallel.recompute": "full"}},
    "VIRAL": {"viral": {"target": "encoder", "head_hidden_width": 24}},
    "VIRAL of whole images": {"viral": {"target": "encoder", "head_hidden_width": 24, "form": "similarity"}},
    "LaVer": {"laver": LAVER, "model": MIXED, "pre": {}},
    "LaVer, the released code's": {
        "laver": {
            **LAVER,
            "sequence": "whole",
            "gram_scope": "micro_batch",
            "gram_positions": "masked",
            "gram_clipped": False,
            "mask_token": "embedding",
            "mask_token_id": 5,
            "mim_reduction": "micro_batch",
            "centring": True,
        },
        "model": MIXED,
    },
    "LaVer, run by run": {"laver": LAVER, "model": {**MIXED, "attention_backend": "split"}},
    "packed rows": {"changes": {"data.packing": True}, "model": {"attention_backend": "dense"}},
    "Qwen2.5-VL": {"vision": NATIVE["qwen25_vl"], "pre": {}},
}


@pytest.fixture(scope="module")
def waits():
    (found,) = run_ranks(waits_of, 1, CASES, timeout=300)
    return found


@pytest.mark.parametrize("name", CASES)
def test_the_passes_of_a_step_never_wait_for_the_device(waits, name):
    assert waits[name] is None, waits[name]


def test_every_gradient_comes_as_a_matrix_product_takes_it():
    """A strided one costs a processor forty times as much; the output layer at labelled tokens alone made all so."""
    labelled = {"parallel.labelled_output": True}
    cases = {name: {"changes": labelled, **CASES[name]} for name in ("NeVA", "PRe", "VIRAL of whole images", "LaVer")}
    (found,) = run_ranks(strided_gradients_of, 1, {"the whole output layer": {}, **cases})
    for name, (reached, strided) in found.items():
        assert reached >= 8, f"{name}: the decoder's products were not looked at"
        assert not strided, f"{name}: {strided}"


@pytest.mark.parametrize(
    "wait",
    [
        lambda here: here.sum().item(),
        lambda here: here.tolist(),
        lambda here: here[here > 0],
        lambda here: torch.where(here > 0),
        lambda here: here.long().unique(),
        lambda here: here.cpu(),
        lambda here: int(here.max()),
        lambda here: torch.ones(3).to(here.device, non_blocking=True),
        lambda here: torch.ones(3).pin_memory().to(here.device),
        lambda here: torch.tensor([1, 2], device=here.device),
        lambda here: here.new_tensor(1.0),
        lambda here: here[torch.tensor([0, 2])],
    ],
)
def test_what_waits_is_found(wait):
    with no_waits(), pytest.raises((Waits, RuntimeError, NotImplementedError)):
        wait(torch.ones(3, device=DEVICE))


def test_what_does_not_wait_passes():
    with no_waits():
        here = torch.ones(3).pin_memory().to(DEVICE, non_blocking=True)
        here[here > 0] = 2.0
        here = here * 0.5 + torch.where(here > 1, here, 0)
        chosen = torch.zeros(2, dtype=torch.int64, device=DEVICE)
        assert here.masked_fill(here > 0, 1).index_select(0, chosen).shape == (2,)
