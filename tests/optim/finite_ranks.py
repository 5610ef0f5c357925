"""The rank's side of test_finite: a step whose gradient is spoilt on one rank."""

from __future__ import annotations

import math
from typing import Any

from tests.compat import tiny_gpt
from tests.compat.tiny_gpt import Layout


def spoilt_step(layout: Layout, name: str, spoilt_rank: int, value: float) -> dict[str, Any]:
    """A good step, then one in which the reduced gradient of the parameters whose names end in ``name`` is
    ``value`` on one rank; what the second raised and whether it changed a weight, and a third step's success."""
    run = tiny_gpt.start(layout)
    import torch
    import torch.distributed as dist

    from nemo_pre.optim.finite import refuse_not_finite
    from nemo_pre.parallel.finite import NotFiniteError

    refuse_not_finite(run.optimizer)
    loss = tiny_gpt.train(run, 1)[0]
    tiny_gpt.forward_backward(run, 1)  # which has gathered what the first step has made of the weights
    before = [parameter.detach().clone() for chunk in run.chunks for parameter in chunk.parameters()]
    named = [each for chunk in run.chunks for each in chunk.named_parameters() if each[0].endswith(name)]
    if dist.get_rank() == spoilt_rank:
        for _, parameter in named:
            parameter.main_grad.fill_(value)
    raised = None
    try:
        run.optimizer.step()
    except NotFiniteError as error:
        raised = str(error)
    after = [parameter.detach() for chunk in run.chunks for parameter in chunk.parameters()]
    kept = all(torch.equal(one, other) for one, other in zip(before, after, strict=True))
    good = math.isfinite(tiny_gpt.train(run, 1, first_step=2)[0])
    return {"loss": loss, "found": bool(named), "raised": raised, "kept": kept, "trains again": good}
