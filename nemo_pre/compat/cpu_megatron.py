"""Patches of Megatron-Core for CPU ranks."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from nemo_pre.compat.cpu_device import get_rng_state, set_rng_state
from nemo_pre.compat.registry import Change, patch

DEFAULT_STATE = "default-rng"  # outside of every fork


@contextlib.contextmanager
def _fork(self, name: str = "model-parallel-rng") -> Iterator[None]:
    if name not in self.states_:
        raise ValueError(f"the random state {name!r} was not added; seed the model-parallel generators first.")
    outside, outer = get_rng_state(), getattr(self, "_current_state_name", DEFAULT_STATE)
    if outer != DEFAULT_STATE:  # forks within forks, of Megatron 0.19
        self.states_[outer] = outside
    set_rng_state(self.states_[name])
    self._current_state_name = name
    try:
        yield
    finally:
        self.states_[name] = get_rng_state()
        set_rng_state(outside if outer == DEFAULT_STATE else self.states_[outer])
        self._current_state_name = outer


@patch(
    "rng-tracker-on-cpu",
    why="CudaRNGStatesTracker.fork warns whenever the CPU generator moved inside it; on CPU that is what it is for.",
    until="Megatron-Core's RNG tracker takes a device.",
    of={"megatron-core": ("0.15.3", "0.19")},
)
def rng_tracker_on_cpu():
    import megatron.core.tensor_parallel.random as megatron_random

    yield Change(megatron_random, "_get_cuda_rng_state", get_rng_state)
    yield Change(megatron_random, "_set_cuda_rng_state", set_rng_state)
    yield Change(megatron_random.CudaRNGStatesTracker, "fork", _fork, written_for=("4fa03c68df45", "6821e1e39725"))


def _new_torch_norm(
    cls: type,
    config: Any,
    hidden_size: int,
    eps: float = 1e-5,
    persist_layer_norm: bool = False,
    zero_centered_gamma: bool = False,
    normalization: str = "LayerNorm",
) -> torch.nn.Module:
    assert not config.layernorm_zero_centered_gamma, "torch's norms have no zero-centred weight"
    norms = {"LayerNorm": torch.nn.LayerNorm, "RMSNorm": torch.nn.RMSNorm}
    norm = norms[config.normalization](hidden_size, eps=eps, dtype=config.params_dtype)
    for parameter in norm.parameters():
        # Each rank sees its part of the sequence only: finalize_model_grads sums what carries this mark.
        parameter.sequence_parallel = config.sequence_parallel
    return norm


@patch(
    "torch-norm",
    why="Without Apex and Transformer Engine the norms are torch's, which Megatron's wrapper refuses under sequence"
    " parallelism, for persist_layer_norm and for memory_efficient_layer_norm: two of them only choose a CUDA kernel,"
    " and the first needs nothing but a mark on the weights.",
    until="WrappedTorchNorm supports sequence parallelism.",
    of={"megatron-core": ("0.15.3", "0.19")},
)
def torch_norm():
    import megatron.core.models.backends as backends
    import megatron.core.models.gpt.gpt_layer_specs as gpt_layer_specs
    import megatron.core.transformer.transformer_block as transformer_block
    from megatron.core.transformer.torch_norm import WrappedTorchNorm

    yield Change(
        WrappedTorchNorm, "__new__", staticmethod(_new_torch_norm), written_for=("6cb54a06fa41", "d3dc509021de")
    )
    # With Apex or Transformer Engine installed these name CUDA kernels.
    yield Change(backends, "LNImpl", WrappedTorchNorm)
    yield Change(gpt_layer_specs, "LNImpl", WrappedTorchNorm)
    yield Change(transformer_block, "LayerNormImpl", WrappedTorchNorm)


@patch(
    "torch-norm-of-hybrid-models",
    why="HybridStack makes its last norm by the name of Transformer Engine's, whatever its specification says.",
    until="HybridStack takes that norm from its specification.",
    of={"megatron-core": ("0.15.3", "0.19")},
    unneeded={"megatron-core 0.15.3": "it has no HybridModel"},
)
def torch_norm_of_hybrid_models():
    import megatron.core.models.hybrid.hybrid_block as hybrid_block
    from megatron.core.transformer.torch_norm import WrappedTorchNorm

    yield Change(hybrid_block, "TENorm", WrappedTorchNorm)


@patch(
    "torch-gradient-norms",
    why="Where Transformer Engine or Apex is installed, Megatron's gradient norms, clipping and copies are their CUDA"
    " kernels, for tensors on a CPU too: a CPU run there, as tests/gpu compares with, dies of a CUDA error.",
    until="Megatron-Core chooses kernels by where the tensors are.",
    of={"megatron-core": ("0.15.3", "0.19")},
)
def torch_gradient_norms():
    from megatron.core import utils
    from megatron.core.optimizer import clip_grads, optimizer

    yield Change(clip_grads, "l2_norm_impl", utils.local_multi_tensor_l2_norm)
    for module in (clip_grads, optimizer):
        yield Change(module, "multi_tensor_applier", utils.local_multi_tensor_applier)
        yield Change(module, "multi_tensor_scale_impl", utils.local_multi_tensor_scale)


def _logits_and_max(vocab_parallel_logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    wide = torch.promote_types(vocab_parallel_logits.dtype, torch.float32)
    vocab_parallel_logits = vocab_parallel_logits.to(wide)
    return vocab_parallel_logits, torch.max(vocab_parallel_logits, dim=-1)[0]


@patch(
    "float64-cross-entropy",
    why="Megatron's cross entropy casts its logits to float32; without this narrowing, gradients of a float64 model"
    " agree between layouts to 1e-15, which tells a wrong term from rounding.",
    until="VocabParallelCrossEntropy widens instead of casting.",
    of={"megatron-core": ("0.15.3", "0.19")},
)
def float64_cross_entropy():
    from megatron.core.tensor_parallel.cross_entropy import VocabParallelCrossEntropy

    yield Change(
        VocabParallelCrossEntropy, "calculate_logits_max", staticmethod(_logits_and_max), written_for="b0f98c9624e7"
    )


class _CudaTypeNames(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func is torch.Tensor.type and isinstance(result, str) and not result.startswith("torch.cuda."):
            return result.replace("torch.", "torch.cuda.", 1)
        return result


def _with_cuda_type_names(function: Callable) -> Callable:
    @functools.wraps(function)
    def wrapped(*args, **kwargs):
        with _CudaTypeNames():
            return function(*args, **kwargs)

    return wrapped


@patch(
    "optimizer-type-names",
    why="Megatron's optimizers sort parameters by Tensor.type() == 'torch.cuda.FloatTensor' and refuse the rest; the"
    " CPU types answer with the CUDA names while those functions run, and nowhere else.",
    until="Megatron-Core compares dtypes.",
    of={"megatron-core": ("0.15.3", "0.19")},
)
def optimizer_type_names():
    import megatron.core.optimizer.clip_grads as clip_grads
    import megatron.core.optimizer.optimizer as optimizer
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    for cls in (optimizer.Float16OptimizerWithFloat16Params, DistributedOptimizer):
        yield Change(cls, "__init__", _with_cuda_type_names(cls.__init__))
    clip = _with_cuda_type_names(clip_grads.clip_grad_by_total_norm_fp32)
    yield Change(clip_grads, "clip_grad_by_total_norm_fp32", clip)
    yield Change(optimizer, "clip_grad_by_total_norm_fp32", clip)


@patch(
    "group-step-adamw",
    why="torch's AdamW keeps 'step' per parameter, which breaks Megatron's reshardable optimizer checkpoints and its"
    " loading of optimizer states; FusedAdam, which they are written for, needs CUDA.",
    until="Megatron-Core's distributed checkpoints support torch's optimizers.",
    of={"megatron-core": ("0.15.3", "0.19")},
)
def group_step_adamw():
    import megatron.core.optimizer as optimizer_package
    import megatron.core.optimizer.distrib_optimizer as distrib_optimizer

    from nemo_pre.compat.cpu_adamw import GroupStepAdamW

    yield Change(optimizer_package, "Adam", GroupStepAdamW)
    yield Change(optimizer_package, "SGD", torch.optim.SGD)
    yield Change(optimizer_package, "USING_PYTORCH_OPTIMIZER", False)  # hands over adam_w_mode, as to FusedAdam
    yield Change(distrib_optimizer, "Adam", GroupStepAdamW)
    yield Change(distrib_optimizer, "HAVE_APEX_OR_TE", True)
    yield Change(distrib_optimizer, "USING_TE_OPTIMIZER", True)  # 'step' is in the parameter groups


def within(collective: Callable) -> Callable:
    """The collective of an output and an input tensor, which copies nothing where a group's one rank has both."""

    @functools.wraps(collective)
    def wrapped(output, input, *args, group=None, **kwargs):
        if group is not None and group.size() == 1 and output.data_ptr() == input.data_ptr():
            return None
        return collective(output, input, *args, group=group, **kwargs)

    return wrapped


@patch(
    "one-rank-collectives",
    why="Without replicas the distributed optimizer gathers every parameter and scatters every gradient to itself, in"
    " place. NCCL does nothing then; gloo copies all of them, for a quarter of a step of a model of 135M.",
    until="torch's gloo returns from collectives of one rank in place.",
    of={"megatron-core": ("0.15.3", "0.19")},
)
def one_rank_collectives():
    import megatron.core.distributed.param_and_grad_buffer as buffers

    for name in ("dist_all_gather_func", "dist_reduce_scatter_func"):
        yield Change(buffers, name, within(getattr(buffers, name)))


PATCHES = [
    rng_tracker_on_cpu,
    torch_norm,
    torch_norm_of_hybrid_models,
    torch_gradient_norms,
    float64_cross_entropy,
    optimizer_type_names,
    group_step_adamw,
    one_rank_collectives,
]
