"""A package ``transformer_engine`` of stand-ins, so that Megatron-Core and NeMo take the ways they take on a GPU.

:func:`install` puts it among the imported modules of a process that rehearses, before Megatron is imported. Megatron's
own wrappers (``megatron.core.extensions.transformer_engine``) are then built on the modules of
:mod:`nemo_pre.compat.rehearsed_te_layers`, and what its branches ask Transformer Engine's version is 2.9.0's. Names
that have no stand-in can be imported, and refuse to be called.
"""

from __future__ import annotations

import importlib.machinery
import importlib.metadata
import sys
import types
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch

from nemo_pre.compat import rehearsed_te_layers as layers
from nemo_pre.compat.rehearsed_te_autocast import Autocast, Recipe
from nemo_pre.compat.rehearsed_te_quantized import NotTransformerEngines

VERSION = "2.9.0"
NAME = "transformer_engine"
# Those that Megatron-Core 0.15.3 and NeMo 2.7.3 import from, of 2.9.0's.
MODULES = (
    "",
    "common",
    "common.recipe",
    "pytorch",
    "pytorch.attention",
    "pytorch.attention.rope",
    "pytorch.cpp_extensions",
    "pytorch.distributed",
    "pytorch.fp8",
    "pytorch.graph",
    "pytorch.module",
    "pytorch.module.base",
    "pytorch.ops",
    "pytorch.optimizers",
    "pytorch.permutation",
    "pytorch.router",
    "pytorch.tensor",
    "pytorch.tensor.float8_tensor",
    "pytorch.tensor.mxfp8_tensor",
    "pytorch.tensor.utils",
)


# What Megatron-Core 0.19 asks for and 2.9.0 does not have: Megatron goes on without it, as there.
NOT_IN_2_9 = {
    "cpu_offload_v1",
    "moe_permute_and_pad_with_probs",
    "post_all_gather_processing",
}


class _Package(types.ModuleType):
    """A module whose names without a stand-in are classes that cannot be made, nor called as functions."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name in NOT_IN_2_9:
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        whole = f"{self.__name__}.{name}"

        def refuse(cls: type, *args: Any, **kwargs: Any) -> Any:
            raise NotTransformerEngines(f"{whole} has no stand-in: it is not rehearsed.")

        absent = type(name, (), {"__new__": refuse, "__doc__": f"{whole} has no stand-in."})
        setattr(self, name, absent)
        return absent


def install() -> None:
    """Put the stand-ins in Transformer Engine's place in this process."""
    made = {}
    for path in MODULES:
        name = f"{NAME}.{path}" if path else NAME
        module = _Package(name, f"A stand-in for {name} {VERSION}.")
        module.__path__ = []
        module.__spec__ = importlib.machinery.ModuleSpec(name, None, is_package=True)
        made[path] = sys.modules[name] = module
        if path:
            parent, _, own = path.rpartition(".")
            setattr(made[parent], own, module)
    made[""].__version__ = VERSION  # type: ignore[attr-defined]
    for path, names in _stand_ins().items():
        for name, value in names.items():
            setattr(made[path], name, value)
    sys.meta_path.insert(0, _Installed())  # type: ignore[arg-type]


class _Distribution(importlib.metadata.Distribution):
    def read_text(self, filename: str) -> str | None:
        return f"Metadata-Version: 2.1\nName: {NAME}\nVersion: {VERSION}\n" if filename == "METADATA" else None

    def locate_file(self, path: Any) -> Any:
        raise NotTransformerEngines("The stand-ins for Transformer Engine have no files.")


class _Installed:
    """Says that the package is installed, to those who ask for its version (``nemo/utils/te_utils.py``)."""

    @staticmethod
    def find_spec(*_: Any) -> None:
        return None

    @staticmethod
    def find_distributions(context: Any) -> list[importlib.metadata.Distribution]:
        return [_Distribution()] if context.name in (NAME, NAME.replace("_", "-")) else []


def _stand_ins() -> dict[str, dict[str, Any]]:
    return {
        "common.recipe": {
            "DelayedScaling": _scaling("delayed"),
            "Float8CurrentScaling": _scaling("tensorwise"),
            "Float8BlockScaling": _scaling("blockwise"),
            "Format": types.SimpleNamespace(E4M3="E4M3", HYBRID="HYBRID"),
        },
        "pytorch": {
            "DotProductAttention": layers.DotProductAttention,
            "LayerNormLinear": layers.LayerNormLinear,
            "Linear": layers.Linear,
            "RMSNorm": layers.RMSNorm,
            "fp8_autocast": fp8_autocast,
        },
        "pytorch.attention": {"_SplitAlongDim": _SplitAlongDim},
        "pytorch.attention.rope": {"apply_rotary_pos_emb": layers.apply_rotary_pos_emb},
        "pytorch.distributed": {"checkpoint": checkpoint},
        "pytorch.fp8": {"FP8GlobalStateManager": _State, "fp8_autocast": fp8_autocast},
        "pytorch.optimizers": {
            "multi_tensor_applier": multi_tensor_applier,
            "multi_tensor_scale": multi_tensor_scale,
            "multi_tensor_scale_tensor": multi_tensor_scale,  # later than 2.9; Megatron 0.19's clipping uses it
            "multi_tensor_l2norm": multi_tensor_l2norm,
        },
    }


def _scaling(name: str) -> type[Recipe]:
    def make(self: Recipe, **numbers: Any) -> None:
        Recipe.__init__(self, name)

    return type(name, (Recipe,), {"__init__": make})


@contextmanager
def fp8_autocast(
    enabled: bool = True, fp8_recipe: Recipe | None = None, fp8_group: Any = None, **others: Any
) -> Iterator[None]:
    """Layers inside multiply in FP8, scaled by the recipe, by the largest values of the group's ranks."""
    with Autocast.entered(fp8_recipe if enabled else None, fp8_group):
        yield


class _State:
    """What Megatron asks ``FP8GlobalStateManager``."""

    @staticmethod
    def is_fp8_enabled() -> bool:
        return Autocast.recipe is not None


class _SplitAlongDim:
    """Views of a tensor, as ``pytorch/utils.py:214`` makes; their gradients are put together again in one piece."""

    @staticmethod
    def apply(tensor: torch.Tensor, dimension: int, sizes: Sequence[int]) -> tuple[torch.Tensor, ...]:
        return torch.split(tensor, sizes, dim=dimension)


def checkpoint(
    function: Callable[..., Any],
    *args: Any,
    distribute_saved_activations: bool = False,
    get_rng_state_tracker: Any = None,
    tp_group: Any = None,
) -> Any:
    """Recomputation within FP8 (``pytorch/distributed.py``): what Megatron's keeps, which is the function's inputs.

    In the first pass weights have both copies made, for the backward pass (``module/linear.py:243``). The second has
    an autocast of its own, without a group (``distributed.py:422``), at whose end largest values are sent once more.
    """
    from megatron.core import tensor_parallel

    recipe = Autocast.recipe

    def run(*inputs: Any) -> Any:
        again = torch.is_grad_enabled()
        with Autocast.recomputing(again), Autocast.entered(recipe) if again else nullcontext():
            return function(*inputs)

    return tensor_parallel.checkpoint(run, distribute_saved_activations, *args)


def multi_tensor_applier(operation: Callable[..., Any], overflow: Any, lists: Any, *args: Any) -> Any:
    return operation(2048 * 32, overflow, lists, *args)


def multi_tensor_scale(chunk: int, overflow: Any, lists: Any, scale: float | torch.Tensor) -> None:
    for source, target in zip(*lists, strict=True):
        target.copy_(source)  # one kernel reads and writes them all; nothing else is made


def multi_tensor_l2norm(chunk: int, overflow: Any, lists: Any, per_parameter: bool) -> tuple[torch.Tensor, None]:
    return lists[0][0].new_empty(1), None  # it stays on the device
