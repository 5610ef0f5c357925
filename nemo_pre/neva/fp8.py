"""FP8 through Transformer Engine: the decoder's layers multiply matrices in it, everything else is as in bf16.

Weights stay bf16 with a float32 master, so a checkpoint means the same at either precision and an export has nothing
to dequantise; ``fp8_delayed`` adds each layer's scales to it. The vision tower, the projector, the word embedding, the
output layer and the heads of objectives lie outside of the decoder and never see FP8. A teacher has layers of its own
and so scales of its own.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from nemo_pre.config.derived import bf16_layers, fp8_recipe
from nemo_pre.config.schema import PrecisionConfig


def fp8_options(precision: PrecisionConfig) -> dict[str, Any]:
    """Megatron's options for the decoder. e4m3 forward and e5m2 for gradients, but blockwise, whose scales are fine
    enough for e4m3 throughout."""
    recipe = fp8_recipe(precision)
    if recipe is None:
        return {}
    at_each_end = bf16_layers(precision)
    return {
        "fp8": "e4m3" if recipe == "blockwise" else "hybrid",
        "fp8_recipe": recipe,
        "fp8_amax_history_len": precision.amax_history,
        "fp8_amax_compute_algo": "max",
        "first_last_layers_bf16": at_each_end > 0,
        "num_layers_at_start_in_bf16": at_each_end,
        "num_layers_at_end_in_bf16": at_each_end,
    }


@contextmanager
def without_fp8(configs: Iterable[Any]) -> Iterator[None]:
    """What runs inside computes in bf16: an evaluation is one of the exported model, its lengths are any, and weights
    that layers keep in FP8 since the step's first micro-batch are not those after the step.

    Args:
        configs: Megatron's of the decoders.
    """
    kept = {id(config): (config, config.fp8) for config in configs}
    try:
        for config, _ in kept.values():
            config.fp8 = None
        yield
    finally:
        for config, fp8 in kept.values():
            config.fp8 = fp8
