"""What the ranks of tests/compat/test_learning_rates.py do: Megatron's groups, NeMo's set-up and NeMo's scheduler."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

from nemo_pre.compat import learning_rates
from tests.compat import tiny_gpt
from tests.compat.checkpoint_ranks import _metadata
from tests.compat.tiny_gpt import Layout, Run

BASE, FLOOR, STEPS, WARMUP = 1e-2, 1e-3, 8, 2
MULTIPLIERS = {"embedding": 0.0, "output_layer": 0.05, "mlp": 2.0}  # 0.05 x BASE is below FLOOR


def multiplier(name: str, parameter: Any) -> float:
    return next((value for part, value in MULTIPLIERS.items() if part in name), 1.0)


class _Parallel(list):
    """What NeMo's set-up reads of its MegatronParallel."""

    def __init__(self, run: Run):
        super().__init__(SimpleNamespace(module=chunk) for chunk in run.chunks)
        self.ddp_config = run.chunks[0].ddp_config


def _start(layout: Layout, condition: Any) -> tuple[Run, Any, Any]:
    learning_rates.apply()
    run = tiny_gpt.start(layout, use_optimizer=False)
    from megatron.core.optimizer import OptimizerConfig
    from nemo.core.optim.lr_scheduler import CosineAnnealing
    from nemo.lightning._strategy_lib import setup_megatron_optimizer
    from nemo.utils import AppState

    AppState().use_gloo_process_groups = True
    config = OptimizerConfig(lr=BASE, weight_decay=0.5, use_distributed_optimizer=layout.distributed_optimizer)
    optimizer = setup_megatron_optimizer(_Parallel(run), config, scale_lr_cond=condition)
    run.optimizer = optimizer.mcore_optimizer
    scheduler = CosineAnnealing(optimizer, max_steps=STEPS, warmup_steps=WARMUP, min_lr=FLOOR)
    return run, optimizer, scheduler


def _rates(optimizer: Any) -> dict[tuple[float, float], float]:
    groups = optimizer.param_groups
    return {(group["pre_lr_mult"], group["pre_wd_mult"]): group["lr"] for group in groups}


def _train(run: Run, optimizer: Any, scheduler: Any, steps: int) -> tuple[list[float], list[dict]]:
    losses, rates = [], []
    for _ in range(steps):
        rates.append(_rates(optimizer))
        losses += tiny_gpt.train(run, steps=1, first_step=scheduler.last_epoch)
        scheduler.step()
    rates.append(_rates(optimizer))
    return losses, rates


def rates_and_movement(layout: Layout) -> dict[str, Any]:
    """Ten steps, two more than the schedule has: the groups, their rates, and how far each parameter moved."""
    run, optimizer, scheduler = _start(layout, learning_rates.PerParameter(multiplier))
    (module,) = tiny_gpt.modules(run)
    before = {name: p.detach().clone() for name, p in module.named_parameters()}
    _, rates = _train(run, optimizer, scheduler, STEPS + 2)
    return {
        "order": list(_rates(optimizer)),
        "empty": [len(group["params"]) == 0 for group in optimizer.param_groups],
        "rates": rates,
        "moved": {name: (p - before[name]).abs().max().item() for name, p in module.named_parameters()},
    }


def plain_rates(layout: Layout) -> list[float]:
    _, optimizer, scheduler = _start(layout, None)
    rates = []
    for _ in range(STEPS + 3):
        rates.append(optimizer.param_groups[0]["lr"])
        scheduler.step()
    return rates


def _state(run: Run, optimizer: Any, is_loading: bool = False) -> dict[str, Any]:
    (module,) = tiny_gpt.modules(run)
    metadata = _metadata("fully_reshardable")
    model = module.sharded_state_dict(metadata=metadata)
    return {
        "model": model,
        "optimizer": optimizer.sharded_state_dict(model, is_loading=is_loading, metadata=metadata),
    }


def save_and_go_on(layout: Layout, directory: Path) -> tuple[list[float], list[dict]]:
    from megatron.core import dist_checkpointing

    run, optimizer, scheduler = _start(layout, learning_rates.PerParameter(multiplier))
    _train(run, optimizer, scheduler, 4)
    state = _state(run, optimizer)
    state["scheduler"] = scheduler.state_dict()  # not sharded: rank 0's goes into the checkpoint, as Lightning's does
    dist_checkpointing.save(state, str(directory))
    return _train(run, optimizer, scheduler, 3)


def resume(layout: Layout, directory: Path) -> tuple[list[float], list[dict]]:
    from megatron.core import dist_checkpointing

    run, optimizer, scheduler = _start(layout, learning_rates.PerParameter(multiplier))
    loaded = dist_checkpointing.load(_state(run, optimizer, is_loading=True), str(directory))
    tiny_gpt.modules(run)[0].load_state_dict(loaded["model"])
    optimizer.load_state_dict(loaded["optimizer"])
    scheduler.load_state_dict(loaded["scheduler"])
    return _train(run, optimizer, scheduler, 3)


def steps_of_empty_groups() -> list[int]:
    """FusedAdam leaves 'step' out of the groups without a parameter; the steps that the state dict holds."""
    run, optimizer, scheduler = _start(Layout(pipeline=2), learning_rates.PerParameter(multiplier))
    _train(run, optimizer, scheduler, 2)
    empty = [group for group in optimizer.param_groups if not group["params"]]
    assert empty
    for group in empty:
        del group["step"]
    (inner,) = run.optimizer.chained_optimizers
    return [group["step"] for group in inner.state_dict()["param_groups"]]


def negative_multiplier() -> str:
    try:
        _start(Layout(), learning_rates.PerParameter(lambda name, parameter: -1.0))
    except ValueError as error:
        return str(error)
    return ""


def only_megatrons_own(layout: Layout) -> tuple[list[Any], list[Any]]:
    """The groups with and without the patches, for a condition that is not ours."""
    groups = []
    for patched in (False, True):
        run = tiny_gpt.start(layout, use_optimizer=False)
        (learning_rates.apply if patched else learning_rates.revert)()
        import megatron.core.optimizer as optimizer_package

        names = {id(p): name for chunk in run.chunks for name, p in chunk.named_parameters()}
        found = optimizer_package._get_param_groups(
            run.chunks, None, lambda name, p: "mlp" in name, 0.5, 1e-3, 0.0, None, None
        )
        groups.append([{**group, "params": [names[id(p)] for p in group["params"]]} for group in found])
        tiny_gpt.stop()
    return groups[0], groups[1]
