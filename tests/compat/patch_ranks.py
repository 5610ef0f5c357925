"""What the ranks of tests/compat/test_patches.py do."""

from __future__ import annotations

import inspect
import logging
from datetime import timedelta
from typing import Any

from nemo_pre.compat import cpu_backend, distributed_setup, learning_rates, progress
from nemo_pre.compat.registry import Change
from tests.compat import tiny_gpt
from tests.compat.tiny_gpt import Layout


def apply_and_revert() -> list[str]:
    """Apply and revert every patch alone, then all together, and look at every attribute; returns the names."""
    import torch

    own = [distributed_setup.seed_of_the_run(7), distributed_setup.timeout_of_the_run(timedelta(seconds=77))]
    everything = [*cpu_backend.patches(), *learning_rates.PATCHES, *progress.PATCHES, *own]
    patches = [patch for patch in everything if patch.unneeded_here() is None]
    changes = [change for patch in patches for change in patch._effects() if isinstance(change, Change)]
    targets = {(id(change.owner), change.attribute): change.owner for change in changes}

    def snapshot() -> dict[Any, Any]:
        return {
            key: vars(owner).get(key[1], "absent") if inspect.isclass(owner) else getattr(owner, key[1])
            for key, owner in targets.items()
        }

    def check(patch: str, before: dict[Any, Any]) -> None:
        after = snapshot()
        assert all(after[key] is before[key] for key in before), patch
        try:
            torch.zeros(1, device="cuda")
        except (RuntimeError, AssertionError):  # torch's own refusal is there again
            return
        raise AssertionError(f"{patch}: 'cuda' still means something after revert")

    before = snapshot()
    for patch in patches:
        assert patch.name
        assert patch.why
        assert patch.until
        patch.apply()
        patch.apply()
        assert patch.applied
        patch.revert()
        check(patch.name, before)
    for _ in range(2):
        cpu_backend.apply()
        cpu_backend.apply()
        learning_rates.apply()
        progress.apply()
        distributed_setup.apply(7, timedelta(seconds=77))
        changed = [key[1] for key, value in snapshot().items() if value is before[key]]
        # Where neither Apex nor Transformer Engine is installed, these are what they are replaced with.
        norms = {"LNImpl", "LayerNormImpl", "l2_norm_impl", "multi_tensor_applier", "multi_tensor_scale_impl"}
        assert set(changed) <= {*norms, "SGD"}, changed
        assert cpu_backend.use_cpu("auto")
        distributed_setup.revert()
        progress.revert()
        learning_rates.revert()
        cpu_backend.revert()
        check("all", before)
    return [patch.name for patch in patches]


def cuda_requests() -> None:
    cpu_backend.apply()
    import torch

    tensor = torch.ones(2)
    made = [
        torch.zeros(2, device="cuda"),
        torch.zeros(2, device="cuda:1"),
        torch.zeros(2, device=torch.device("cuda", 0)),
        torch.zeros(2, device=torch.cuda.current_device()),
        torch.empty_like(tensor, device="cuda"),
        torch.tensor(3, pin_memory=True).to("cuda", non_blocking=True),
        tensor.to(torch.device("cuda")),
        tensor.to(device="cuda", dtype=torch.float64),
        tensor.to(0),
        tensor.cuda(),
        tensor.cuda(torch.cuda.current_device()),
        tensor.pin_memory(),
        tensor.new_zeros(3, device="cuda"),
        torch.randn(2, device="cuda", pin_memory=True),
        torch.arange(2, device="cuda:0"),
    ]
    assert all(made_tensor.device.type == "cpu" for made_tensor in made)
    with torch.device("meta"):
        assert torch.zeros(2).is_meta, "what makes tensors is no longer known to torch's own device mode"
    assert tensor.to(torch.float64).dtype == torch.float64
    assert not torch.cuda.is_available()
    linear = torch.nn.Linear(2, 2)
    weight = linear.weight
    assert linear.cuda().weight is weight
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda.current_stream().wait_stream(torch.cuda.default_stream())
    torch.cuda.synchronize()

    class MakesACudaTensorInBackward(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x * 2

        @staticmethod
        def backward(ctx, grad):
            return grad * torch.full((1,), 2.0, device="cuda")

    for run_backward in (torch.Tensor.backward, torch.autograd.backward):
        leaf = torch.ones(1, requires_grad=True)
        run_backward(MakesACudaTensorInBackward.apply(leaf).sum())
        assert leaf.grad.item() == 2.0


class _Messages(logging.Handler):
    def __init__(self):
        super().__init__()
        self.messages: list[str] = []

    def emit(self, record):
        self.messages.append(record.getMessage())


def random_states() -> dict[str, Any]:
    """Fork the trackers of a TP2 layout; returns what was drawn inside and outside."""
    tiny_gpt.start(Layout(tensor=2), use_optimizer=False)
    import torch
    from megatron.core import tensor_parallel

    messages = _Messages()
    logging.getLogger("megatron.core.tensor_parallel.random").addHandler(messages)
    torch.manual_seed(5)
    tensor_parallel.model_parallel_cuda_manual_seed(11)
    torch.manual_seed(5)
    outside_expected = torch.rand(4)
    torch.manual_seed(5)
    outside = [torch.rand(1)]
    with tensor_parallel.get_cuda_rng_tracker().fork():
        inside = torch.rand(4)
    outside.append(torch.rand(1))
    with tensor_parallel.get_cuda_rng_tracker().fork():
        more = torch.rand(4)
    outside.append(torch.rand(2))
    assert torch.cat(outside).equal(outside_expected), "a fork moved the default generator"
    assert not inside.equal(more), "a fork started from the same state again"
    assert not messages.messages
    return {"inside": inside, "more": more}


def nemo_seeds() -> bool:
    """NeMo's seeding also seeds the model-parallel generators."""
    tiny_gpt.start(Layout(tensor=2), use_optimizer=False)
    import torch
    from megatron.core import tensor_parallel
    from nemo.lightning import megatron_init

    tensor_parallel.get_cuda_rng_tracker().reset()
    megatron_init._set_random_seed(3)
    first = torch.rand(1)
    with tensor_parallel.get_cuda_rng_tracker().fork():
        torch.rand(1)
    torch.manual_seed(3)
    return first.equal(torch.rand(1))


def seed_and_timeouts() -> dict[str, Any]:
    """Set up as NeMo's strategy does it, in a run of seed 7 whose collectives wait 77 seconds."""
    cpu_backend.apply()
    distributed_setup.apply(7, timedelta(seconds=77))
    import torch
    import torch.distributed as dist
    from megatron.core import parallel_state
    from megatron.core.model_parallel_config import ModelParallelConfig
    from nemo.lightning import _strategy_lib

    _strategy_lib.init_parallel_ranks(1, 0, 0, ModelParallelConfig())
    dist.init_process_group("gloo", timeout=None)
    _strategy_lib.init_model_parallel()
    groups = [dist.group.WORLD, parallel_state.get_data_parallel_group(), dist.new_group(backend="gloo")]
    waits = [group._get_backend(torch.device("cpu")).options._timeout for group in groups]
    found = {"seed": torch.initial_seed(), "seconds": [wait.total_seconds() for wait in waits]}
    distributed_setup.revert()
    return found


def dropout_is_replayed() -> float:
    """Full recomputation with dropout gives the gradients of the same masks; the largest difference is returned."""
    import torch

    gradients = []
    for recompute in (False, True):
        model = {"hidden_dropout": 0.3, "attention_dropout": 0.3}
        if recompute:
            model |= {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 2}
        run = tiny_gpt.start(Layout(tensor=2, sequence=True, precision="fp64", model=model), use_optimizer=False)
        torch.manual_seed(9)
        tiny_gpt.forward_backward(run)
        gradients.append([p.main_grad.clone() for p in run.chunks[0].parameters()])
        tiny_gpt.stop()
    assert max(g.abs().max().item() for g in gradients[0]) > 0.01
    return max((a - b).abs().max().item() for a, b in zip(*gradients, strict=True))


def rank_zero_prints_progress() -> tuple[int, str | None]:
    """Only rank 0 asks for the timers; returns how often Megatron's collective was entered, and what was printed."""
    progress.apply()
    tiny_gpt.start(Layout(data=2), use_optimizer=False)
    import torch
    from megatron.core import timers as megatron_timers
    from nemo.lightning.pytorch.callbacks.progress_printer import ProgressPrinter

    entered = []
    megatron_timers.dist_all_gather_func = lambda *args, **kwargs: entered.append(args)
    timers = megatron_timers.Timers(log_level=0, log_option="minmax")
    timers("forward-backward", log_level=0).start()
    timers("forward-backward").stop()
    printed = None
    if torch.distributed.get_rank() == 0:
        printed = ProgressPrinter(log_interval=2).log_megatron_timers(timers)
    total = torch.ones(1)
    torch.distributed.all_reduce(total)
    assert total.item() == 2
    if torch.distributed.get_rank() == 0:
        assert not entered
        timers("forward-backward").start()
        timers("forward-backward").stop()
        progress.revert()
        ProgressPrinter(log_interval=2).log_megatron_timers(timers)
    return len(entered), printed
