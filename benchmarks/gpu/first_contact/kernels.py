"""Transformer Engine, losses and attention: on the device against float64 on the CPU, and their speed."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable
from typing import Any

from benchmarks.gpu.first_contact.record import Record

# Of the norm: float32 sums in another order, bf16 rounds operands to 8 bits, e4m3 to 4.
OF_FLOAT32, OF_BF16, OF_FP8 = 2e-4, 2e-2, 8e-2


def apart(found: Any, expected: Any) -> float:
    """Norm of the difference over the norm, in float64; NaN where there is one."""
    found, expected = found.detach().double().cpu(), expected.detach().double().cpu()
    return float((found - expected).norm() / expected.norm())


def transformer_engine(record: Record) -> None:
    """A linear layer of random weights, forward and backward: in bf16 and once in each FP8 recipe of Hopper's."""
    import torch
    import transformer_engine.pytorch as te
    from transformer_engine.common import recipe

    record.only_with_a_gpu("transformer_engine.pytorch.Linear")
    torch.manual_seed(0)
    layer = te.Linear(512, 768, params_dtype=torch.bfloat16, device="cuda")
    inputs, upstream = torch.randn(256, 512), torch.randn(256, 768)
    weight, bias = layer.weight.detach().double().cpu(), layer.bias.detach().double().cpu()
    given = inputs.bfloat16().double()
    expected = {
        "output": given @ weight.T + bias,
        "gradient of the input": upstream.bfloat16().double() @ weight,
        "gradient of the weight": upstream.bfloat16().double().T @ given,
    }
    recipes = {
        "bf16": None,
        "delayed": recipe.DelayedScaling(),
        "tensorwise": recipe.Float8CurrentScaling(),
        "blockwise": recipe.Float8BlockScaling(),
    }
    for name, of_fp8 in recipes.items():
        with record.part(name):
            seen = inputs.bfloat16().cuda().requires_grad_()
            layer.zero_grad()
            for _ in range(2):  # delayed scales are those of the step before
                seen.grad = layer.weight.grad = None
                with te.fp8_autocast(enabled=of_fp8 is not None, fp8_recipe=of_fp8):
                    output = layer(seen)
                output.backward(upstream.bfloat16().cuda())
            found = {"output": output, "gradient of the input": seen.grad, "gradient of the weight": layer.weight.grad}
            for what, tensor in found.items():
                error = apart(tensor, expected[what])
                if of_fp8 is None:
                    record.at_most(f"te.Linear in bf16, {what}", error, OF_BF16, "from float64 on the CPU")
                else:  # an error of bf16's size would say that FP8 was not used
                    record.between(f"te.Linear in FP8 {name}, {what}", error, 0.01, OF_FP8, "from float64 on the CPU")


def losses(record: Record) -> None:
    """Value and gradient of every loss, for one image and for four, in both types."""
    import torch

    from benchmarks.losses import losses as expressions

    device = "cpu" if record.on_cpu else "cuda"
    for images in (1, 4):
        for name, (sides, width) in expressions(Namespace(images=images)).items():
            width //= 16 if record.on_cpu else 1
            generator = torch.Generator().manual_seed(images)
            drawn = [torch.randn(576 * images, width, generator=generator) for _ in range(2)]
            for dtype, bound in ((torch.float32, OF_FLOAT32), (torch.bfloat16, OF_BF16)):
                label = f"{name}, {images} x 576 x {width}, {str(dtype).removeprefix('torch.')}"
                with record.part(label):
                    found = _value_and_gradient(sides["ours"], drawn, device, dtype)
                    rounded = [tensor.to(dtype) for tensor in drawn]
                    expected = _value_and_gradient(sides["plain"], rounded, "cpu", torch.float32)
                    for what, one, other in zip(("value", "gradient"), found, expected, strict=True):
                        record.at_most(
                            f"{label}, {what}", apart(one, other), bound, "from the plain expression on the CPU"
                        )


def _value_and_gradient(loss: Callable[..., Any], drawn: list[Any], device: str, dtype: Any) -> tuple[Any, Any]:
    student, teacher = (tensor.to(device, dtype, copy=True) for tensor in drawn)
    student.requires_grad_()
    value = loss(student, teacher)
    value.backward()
    return value, student.grad


def attention(record: Record) -> None:
    """Output and gradients of the three backends, two shapes, two types, against the dense mask in float64."""
    from nemo_pre.neva.mixed_attention import _attend_flex, attend_dense, attend_split

    shapes = {(512, 8, 2, 64): 0, (1152, 28, 4, 128): 1}
    if record.on_cpu:
        shapes = {(256, 4, 2, 32): 0, (320, 7, 1, 64): 1}
    # FlexAttention last: it compiles for most of the time.
    for backend, attend in {"dense": attend_dense, "split": attend_split, "flex": _attend_flex}.items():
        if backend == "flex":
            record.only_with_a_gpu("FlexAttention, which has no backward pass on a CPU")
        for shape, seed in shapes.items():
            _one_attention(record, backend, attend, shape, seed)


def _one_attention(
    record: Record, backend: str, attend: Callable[..., Any], shape: tuple[int, int, int, int], seed: int
) -> None:
    import torch

    from nemo_pre.neva.mixed_attention import attend_dense

    length, heads, groups, width = shape
    structure = two_samples(length)
    generator = torch.Generator().manual_seed(seed)
    drawn = [torch.randn(1, number, length, width, generator=generator) for number in (heads, groups, groups)]
    upstream = torch.randn(1, heads, length, width, generator=generator)

    def outputs(attend: Callable[..., Any], dtype: Any, where: str, told_on: str, rounded: Any) -> list[Any]:
        tensors = [tensor.to(rounded).to(where, dtype, copy=True).requires_grad_() for tensor in drawn]
        output = attend(*tensors, structure.to(told_on), 0, width**-0.5)
        output.backward(upstream.to(rounded).to(where, dtype))
        return [output, *(tensor.grad for tensor in tensors)]

    device = "cpu" if record.on_cpu else "cuda"
    # FlexAttention's float32 products may be TF32's.
    bounds = {torch.float32: 2e-3 if backend == "flex" else OF_FLOAT32, torch.bfloat16: OF_BF16}
    for dtype, bound in bounds.items():
        label = f"{backend}, {length} tokens, {heads}/{groups} heads of {width}, {str(dtype).removeprefix('torch.')}"
        with record.part(label):
            expected = outputs(attend_dense, torch.float64, "cpu", "cpu", dtype)
            found = outputs(attend, dtype, device, "cpu" if backend == "split" else device, dtype)
            worst = max(apart(one, other) for one, other in zip(found, expected, strict=True))
            finite = all(bool(tensor.isfinite().all()) for tensor in found)
            record.at_most(f"{label}, output and gradients", worst if finite else float("nan"), bound, "from float64")


def two_samples(length: int) -> Any:
    """The structure of a row of two samples, each with an image between its words."""
    import torch

    from nemo_pre.parallel.token_streams import IMAGE, ORDER, SEQUENCE

    second = length * 5 // 8
    structure = torch.zeros(1, length, 3, dtype=torch.int32)
    structure[0, :, ORDER] = torch.arange(length)
    structure[0, second:, SEQUENCE] = -1
    structure[0, :, IMAGE] = -1
    structure[0, 24 : length // 3, IMAGE] = 0
    structure[0, second + 8 : length - 16, IMAGE] = 1
    return structure


def flex(record: Record) -> None:
    """Time per unmasked pair beside causal attention's, and whole times beside the dense mask's."""
    from benchmarks import mixed_attention

    length = 704 if record.on_cpu else 2048
    if record.on_cpu:
        mixed_attention.ROUNDS, mixed_attention.WARM_UP = 2, 1
    found = mixed_attention.measure(length, not record.on_cpu)
    for kernel in ("causal", "dense", "split", "flex"):
        if kernel in found:
            record.fact(
                f"{kernel}, ms forward and backward", [found[kernel][f"{way}_ms"] for way in ("forward", "backward")]
            )
    record.only_with_a_gpu("FlexAttention's kernels")
    for way, goal in (("forward", 0.8), ("backward", 0.75)):
        speed = found["flex"][f"{way}_speed_per_pair_of_causal"]
        record.at_least(f"flex, {way} speed per pair of causal", speed, goal, "the goal of docs/performance.md")
        of_dense = found["flex"][f"{way}_ms"] / found["dense"][f"{way}_ms"]
        record.at_most(f"flex, {way} time of the dense mask's", of_dense, 1.0)
