"""How far the gradient that objectives' heads send to the visual tokens is off in a bf16 run, and what float32 costs.

    python -m benchmarks.head_precision

First, on the CPU: the error of the gradient to the tokens, relative to its norm, of heads at width 1024 on 256 tokens
of an image, against float64 of the same bf16 weights and tokens; the last two rows against unrounded ones. TF32 is
emulated: factors are rounded to 10 bits of mantissa, sums are float32's. Then the planner's: what of a step the heads'
products take more than they would in bf16, with TF32 as they run, and with float32's own units; that is not measured.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nemo_pre.config.compose import compose_run
from nemo_pre.losses import gram_anchoring_loss, masked_prediction_loss, predictive_loss
from nemo_pre.planner.devices import Device, Efficiency, device_of_cluster
from nemo_pre.planner.load import largest_load
from nemo_pre.planner.step_time import step_time
from nemo_pre.terms.float32 import Float32Linear

WIDTH, TOKENS = 1024, 256
EXPERIMENTS = [
    f"siglip2_qwen25_7b_{stage}" for stage in ("stage2_full_pre", "laver_stage2_knowledge", "stage2_full_viral")
]
Loss = Callable[[nn.Module, nn.Module, Tensor], Tensor]


# --- the heads and their losses -------------------------------------------------------------------------------------


def head(layer: Callable[..., nn.Module], widths: tuple[int, ...]) -> nn.Sequential:
    """Linear layers with GELUs between, of Kaiming-normal weights as LaVer's head has; the same at every call."""
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for inputs, outputs in itertools.pairwise(widths):
        linear = layer(inputs, outputs)
        nn.init.kaiming_normal_(linear.weight)
        layers += [linear, nn.GELU()]
    return nn.Sequential(*layers[:-1])


def tokens(seed: int) -> Tensor:
    """An image's tokens in float64, alike among themselves, of length sqrt(WIDTH)."""
    numbers = torch.Generator().manual_seed(seed)
    draw = partial(torch.randn, generator=numbers, dtype=torch.float64)
    return F.rms_norm(draw(1, WIDTH) + draw(TOKENS, WIDTH), (WIDTH,))


def masked_prediction(student: nn.Module, teacher: nn.Module, seen: Tensor) -> Tensor:
    masked = slice(None, None, 4)
    return masked_prediction_loss(student(seen)[masked], _taught(teacher, seen)[masked], 0.1, 0.04)[0]


def gram(student: nn.Module, teacher: nn.Module, seen: Tensor) -> Tensor:
    return gram_anchoring_loss(student(seen), _taught(teacher, seen), torch.zeros(TOKENS, dtype=torch.long))[0]


def cosine(student: nn.Module, _: nn.Module, seen: Tensor) -> Tensor:
    return predictive_loss(student(seen), tokens(3).bfloat16().to(seen.dtype))[0]


@torch.no_grad()
def _taught(teacher: nn.Module, seen: Tensor) -> Tensor:
    return teacher((tokens(1) + tokens(2) / 4).bfloat16().to(seen.dtype))


LOSSES: dict[str, tuple[Loss, tuple[int, ...]]] = {
    "L_MIM": (masked_prediction, (WIDTH, 2048, 2048, WIDTH)),
    "L_CGA": (gram, (WIDTH, 2048, 2048, WIDTH)),
    "PRe": (cosine, (WIDTH, WIDTH // 4, WIDTH)),
}


# --- TF32 -----------------------------------------------------------------------------------------------------------


def in_tf32(values: Tensor) -> Tensor:
    """Float32 with 10 bits of mantissa, rounded to the nearest."""
    bits = values.float().contiguous().view(torch.int32)
    return ((bits + (1 << 12)) & ~((1 << 13) - 1)).view(torch.float32)


class _TF32Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(values, weight)
        return in_tf32(values) @ in_tf32(weight).T

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, Tensor]:
        values, weight = ctx.saved_tensors
        grad = in_tf32(grad_output)
        return (grad @ in_tf32(weight)).to(values.dtype), (grad.T @ in_tf32(values)).to(weight.dtype)


class TF32Linear(nn.Linear):
    def forward(self, values: Tensor) -> Tensor:
        return _TF32Product.apply(values, self.weight) + self.bias.float()


# --- the table ------------------------------------------------------------------------------------------------------


def gradient(loss: Loss, made: nn.Module, seen: Tensor) -> Tensor:
    """The gradient to the tokens; the teacher's head is the student's."""
    seen = seen.clone().requires_grad_()
    (found,) = torch.autograd.grad(loss(made, made, seen), [seen])
    return found.double()


def errors(loss: Loss, widths: tuple[int, ...]) -> dict[str, float]:
    """The relative errors of the gradient, by row of the table."""
    whole, seen = head(nn.Linear, widths).double(), tokens(1)
    rounded = head(nn.Linear, widths).bfloat16().double()
    of_rounded = gradient(loss, rounded, seen.bfloat16().double())
    found = {
        name: (gradient(loss, head(layer, widths).bfloat16(), seen.bfloat16()), of_rounded)
        for name, layer in (("bf16", nn.Linear), ("float32", Float32Linear), ("TF32 (emulated)", TF32Linear))
    }
    exact = gradient(loss, whole, seen)
    found["tokens rounded to bf16, else float64"] = gradient(loss, whole, seen.bfloat16().double()), exact
    found["weights rounded to bf16, else float64"] = gradient(loss, rounded, seen), exact
    return {name: ((one - other).norm() / other.norm()).item() for name, (one, other) in found.items()}


def planned(experiment: str) -> tuple[float, float]:
    """What of a step the heads' products take more than in bf16: as TF32, and on float32's own units."""
    config = compose_run([f"experiment={experiment}"])
    device, load = device_of_cluster(config.cluster), largest_load(config)
    assert device is not None

    def seconds(gpu: Device) -> float:
        return step_time(config, load, gpu, Efficiency()).seconds

    in_bf16 = seconds(replace(device, tf32=device.bf16))
    as_it_is, strict = seconds(device), seconds(replace(device, tf32=device.fp32))
    return (as_it_is - in_bf16) / in_bf16, (strict - in_bf16) / in_bf16


def main() -> None:
    columns = {name: errors(*how) for name, how in LOSSES.items()}
    print(f"{'error of the gradient to the tokens, %':40}" + "".join(f"{name:>9}" for name in columns))
    for row in next(iter(columns.values())):
        print(f"{row:40}" + "".join(f"{100 * column[row]:9.2f}" for column in columns.values()))
    print(f"\n{'planned, % of a step more than in bf16':40}{'TF32':>9}{'float32':>9}")
    for experiment in EXPERIMENTS:
        print(f"{experiment:40}" + "".join(f"{100 * share:9.2f}" for share in planned(experiment)))


if __name__ == "__main__":
    main()
