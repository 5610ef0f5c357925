"""One decoder layer of Qwen2.5-7B's width as the product builds it: its error beside float32, and its time.

The reference is Megatron's own layer, of PyTorch's operations in float32, with the same weights and inputs.
"""

from __future__ import annotations

import copy
import statistics
import time
from typing import Any

from benchmarks.gpu.first_contact.kernels import apart
from benchmarks.gpu.first_contact.machine import data_sheet
from benchmarks.gpu.first_contact.record import Record

TOKENS, ON_CPU = 1024, 64
TIMED_ROWS = 4  # of 1,024 tokens, for the time
# Weights and inputs are rounded to bf16 in the reference too, so what is left is the layer's own arithmetic.
OF_BF16, OF_FP8 = 2e-2, 0.2
NORMS = {
    "input_layernorm.weight": "self_attention.linear_qkv.layer_norm_weight",
    "pre_mlp_layernorm.weight": "mlp.linear_fc1.layer_norm_weight",
}


def bf16(record: Record) -> None:
    """Error and time in bf16."""
    reference, layer, run = _blocks(record, "bf16")
    _errors(record, "bf16", reference, layer, run, 0.0, OF_BF16)
    seconds = _seconds(layer, run, record.on_cpu)
    record.fact("milliseconds, forward and backward", round(1000 * seconds, 2))
    record.only_with_a_gpu("the time of a layer of Transformer Engine's")
    matrices = sum(weight.numel() for weight in layer.parameters() if weight.dim() == 2)
    rate = 6 * matrices * TOKENS * TIMED_ROWS / seconds / data_sheet().bf16
    record.between("part of the data sheet's bf16 rate", rate, 0.3, 0.95, "the planner takes 0.5")


def fp8(record: Record, recipe: str) -> None:
    """Error and time of one FP8 recipe, beside bf16 in the same layer."""
    record.only_with_a_gpu("Transformer Engine's layers, which alone multiply in FP8")
    from nemo_pre.neva.fp8 import without_fp8

    reference, layer, run = _blocks(record, f"fp8_{recipe}")
    # An error of bf16's size would say that FP8 was not used.
    _errors(record, f"FP8 {recipe}", reference, layer, run, 0.015, OF_FP8)
    seconds = _seconds(layer, run, record.on_cpu)
    with without_fp8([layer.config]):
        of_bf16 = _seconds(layer, run, record.on_cpu)
    record.fact("milliseconds, in FP8 and in bf16", [round(1000 * each, 2) for each in (seconds, of_bf16)])
    record.at_least("speed of bf16's", of_bf16 / seconds, 1.1, "the goal for whole steps is 1.3")


def _blocks(record: Record, precision: str) -> tuple[Any, Any, Any]:
    """The reference, the product's layer with its weights, and what is given to both."""
    import torch
    import torch.distributed as dist
    from megatron.core import parallel_state
    from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
    from megatron.core.transformer.transformer_block import TransformerBlock

    from benchmarks.gpu.first_contact.runs import free_port
    from benchmarks.overhead import Settings, run_config
    from nemo_pre.compat import cpu_backend
    from nemo_pre.neva.build import _fused, _language_config

    whole = ["precision.bf16_layers=0"] if precision in ("fp8_tensorwise", "fp8_blockwise") else []
    settings = Settings(
        name="layer",
        sides={"layer": [f"precision={precision}", *whole], "reference": ["precision=fp32"]},
        model="digits_tiny" if record.on_cpu else "siglip2_qwen25_7b",
        layers=1,
        precision="fp32",
        micro_batch_size=1,
        num_microbatches=1,
        sequence_length=None,
        blocks=1,
        steps_per_block=1,
    )
    config, plain = (run_config(settings, side, "unused", 1) for side in settings.sides)
    if record.on_cpu:
        cpu_backend.apply()
    device = "cpu" if record.on_cpu else "cuda"
    dist.init_process_group(
        "gloo" if record.on_cpu else "nccl", init_method=f"tcp://127.0.0.1:{free_port()}", rank=0, world_size=1
    )
    parallel_state.initialize_model_parallel()
    model_parallel_cuda_manual_seed(1)
    fused = _fused(not record.on_cpu)
    record.fact("layers", "Transformer Engine's" if fused else "Megatron's")

    def block(options: Any, dtype: Any) -> Any:
        options = copy.copy(options)
        options.params_dtype = options.pipeline_dtype = options.autocast_dtype = dtype
        options.bf16 = dtype == torch.bfloat16
        spec = options.transformer_layer_spec(options)
        return TransformerBlock(options, spec, post_layer_norm=False).to(device, dtype)

    reference = block(_language_config(plain, False, not record.on_cpu), torch.float32)
    layer = block(_language_config(config, fused, not record.on_cpu), torch.bfloat16)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in reference.parameters():
            # As large as keeps what the layer adds as large as what it is added to: or the sum's rounding is compared.
            drawn = torch.randn(weight.shape, generator=generator) * weight.shape[-1] ** -0.5
            weight.copy_((drawn + (weight.dim() == 1)).bfloat16())
    weights = {name: tensor for name, tensor in reference.state_dict().items() if isinstance(tensor, torch.Tensor)}
    if fused:
        weights = {_renamed(name): tensor for name, tensor in weights.items()}
    left = layer.load_state_dict(weights, strict=False)
    lost = [name for name in [*left.missing_keys, *left.unexpected_keys] if "_extra_state" not in name]
    record.check("weights of the reference that the layer took", "all" if not lost else str(lost), "all", not lost)
    rotary = RotaryEmbedding(layer.config.kv_channels, 1.0, rotary_base=layer.config.rotary_base).to(device)

    given: dict[tuple[Any, int], tuple[Any, Any]] = {}  # drawn once: a time is not to be the generator's
    length = ON_CPU if record.on_cpu else TOKENS
    mask, angles = _causal(length, device), rotary(length)

    def run(block: Any, dtype: Any, rows: int = 1) -> tuple[Any, Any]:
        """Computes what the block adds to its inputs, and the gradient of the inputs beside the residual's."""
        if (dtype, rows) not in given:
            drawn, shape = torch.Generator().manual_seed(1), (length, rows, block.config.hidden_size)
            one, other = (torch.randn(shape, generator=drawn).bfloat16().to(device, dtype) for _ in range(2))
            given[dtype, rows] = one, other
        inputs, upstream = given[dtype, rows]
        inputs = inputs.detach().requires_grad_()
        block.zero_grad()
        output = block(inputs, None if fused and block is layer else mask, rotary_pos_emb=angles)
        output.backward(upstream)
        return output.detach().float() - inputs.detach().float(), inputs.grad - upstream

    return reference, layer, run


def _renamed(name: str) -> str:
    """A norm's name where it is fused with the matrices behind it."""
    for plain, in_one in NORMS.items():
        if name.endswith(plain):
            return name.removesuffix(plain) + in_one
    return name


def _causal(length: int, device: str) -> Any:
    import torch

    return torch.ones(1, 1, length, length, dtype=torch.bool, device=device).triu(1)


def _errors(record: Record, name: str, reference: Any, layer: Any, run: Any, least: float, most: float) -> None:
    """Errors are those without the residual, which would hide what the layer adds."""
    import torch

    expected, of_input = run(reference, torch.float32)
    for _ in range(2):  # delayed scales are those of the step before
        found, its_input = run(layer, torch.bfloat16)
    record.between(f"{name}: what the layer adds", apart(found, expected), least, most, "from float32")
    record.between(f"{name}: gradient of the input", apart(its_input, of_input), least, most, "from float32")
    theirs = {_renamed(each): weight.grad for each, weight in reference.named_parameters()}
    ours = {_renamed(each): weight.grad for each, weight in layer.named_parameters()}
    errors = [(apart(grad, theirs[each]), each) for each, grad in ours.items() if grad.dim() == 2]
    worst, where = max(errors, key=lambda error: (error[0] != error[0], error[0]))  # NaN above all
    record.between(f"{name}: the worst weight's gradient", worst, least, most, where)


def _seconds(layer: Any, run: Any, on_cpu: bool) -> float:
    """Median of a forward and backward pass."""
    import torch

    times = []
    for _ in range(3 if on_cpu else 13):
        if not on_cpu:
            torch.cuda.synchronize()
        began = time.perf_counter()
        run(layer, torch.bfloat16, 1 if on_cpu else TIMED_ROWS)
        if not on_cpu:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    return statistics.median(times[1 if on_cpu else 3 :])
