"""Megatron-Core and NeMo on CPU ranks over gloo.

    from nemo_pre.compat import cpu_backend

    if cpu_backend.use_cpu(config.platform):
        cpu_backend.apply()

Call :func:`apply` once per process, in its main thread, before or after NeMo is imported (before is cheaper).
A CPU run also needs :data:`TRANSFORMER_CONFIG` in every ``TransformerConfig``, ``nl.Trainer(accelerator="cpu")``,
``MegatronStrategy(process_group_backend="gloo")`` and Megatron's local layer spec.
"""

from __future__ import annotations

from nemo_pre.compat import versions
from nemo_pre.compat.registry import Patch
from nemo_pre.config.run import RunConfig
from nemo_pre.options import alternatives, choices_of

# What a TransformerConfig must say where neither CUDA kernels nor a compiler exist.
TRANSFORMER_CONFIG = {
    "use_cpu_initialization": True,
    "gradient_accumulation_fusion": False,
    "bias_activation_fusion": False,
    "bias_dropout_fusion": False,
    "masked_softmax_fusion": False,
    "apply_rope_fusion": False,
    "cross_entropy_loss_fusion": False,
    "persist_layer_norm": False,
}

# What it must also say, on GPUs too, for an interleaved pipeline of two ranks. There the next and the previous stage
# are the same rank, and Megatron's batched exchange, which is the default, pairs activations with gradients:
# the run goes on with wrong numbers.
INTERLEAVED_CONFIG = {"overlap_p2p_comm": True, "batch_p2p_comm": False}


def use_cpu(platform: str) -> bool:
    """Whether a run with this ``platform`` (``auto``, ``cpu`` or ``gpu``) goes on CPU ranks.

    Raises:
        ValueError: an unknown platform, or ``gpu`` on a machine without one.
    """
    if platform not in choices_of(RunConfig, "platform"):
        raise ValueError(f"platform={platform} is unknown; choose {alternatives(RunConfig, 'platform')}.")
    if platform == "cpu" or any(patch.applied for patch in patches_of_torch()):
        return True
    import torch

    if platform == "gpu" and not torch.cuda.is_available():
        raise ValueError("platform=gpu, but torch sees no CUDA device; choose platform=cpu or platform=auto.")
    return not torch.cuda.is_available()


def patches_of_torch() -> list[Patch]:
    from nemo_pre.compat import cpu_device

    return cpu_device.PATCHES


def patches() -> list[Patch]:
    """Every patch of the CPU backend, in the order in which they are applied."""
    from nemo_pre.compat import checkpoints, cpu_device, cpu_megatron, cpu_nemo

    return [*cpu_device.PATCHES, *cpu_megatron.PATCHES, *cpu_nemo.PATCHES, *checkpoints.PATCHES]


def apply() -> None:
    """Apply every patch; a second call does nothing.

    Raises:
        ValueError: a package has a version that the patches were not written for.
    """
    versions.check()  # before anything is imported
    for patch in patches():
        patch.apply()


def revert() -> None:
    """Restore what was there before :func:`apply`."""
    for patch in reversed(patches()):
        patch.revert()
