"""Patches of NeMo for CPU ranks."""

from __future__ import annotations

from typing import Any

from nemo_pre.compat.registry import Change, patch


@patch(
    "seed-model-parallel-rng",
    why="NeMo seeds Megatron's model-parallel generators only if torch counts a GPU; unseeded, tensor-parallel"
    " initialisation and dropout raise.",
    until="nemo.lightning.megatron_init seeds them on every device.",
    of={"nemo_toolkit": ("2.7.3",)},
)
def seed_model_parallel_rng():
    import nemo.lightning.megatron_init as megatron_init
    from megatron.core import parallel_state, tensor_parallel

    seed_default_generators = megatron_init._set_random_seed

    def set_random_seed(seed_: int) -> None:
        seed_default_generators(seed_)
        # As NeMo does with a GPU: another seed on every pipeline stage; Megatron adds the tensor-parallel rank.
        stage = parallel_state.get_pipeline_model_parallel_rank()
        tensor_parallel.model_parallel_cuda_manual_seed(seed_ + 100 * stage)

    yield Change(megatron_init, "_set_random_seed", set_random_seed, written_for="431f155d7863")


def _same_device(checkpoint: dict[str, Any]) -> dict[str, Any]:
    return checkpoint


@patch(
    "checkpoint-tensors-stay",
    why="After loading a checkpoint NeMo asserts that CUDA is initialised and moves tensors between GPUs.",
    until="nemo.lightning.io.pl._fix_tensors_device skips what is not on a GPU.",
    of={"nemo_toolkit": ("2.7.3",)},
)
def checkpoint_tensors_stay():
    import nemo.lightning.io.pl as nemo_checkpoint_io

    yield Change(nemo_checkpoint_io, "_fix_tensors_device", _same_device, written_for="561d518d996e")


PATCHES = [seed_model_parallel_rng, checkpoint_tensors_stay]
