"""FP8: what is refused before anything starts, and what would have no effect."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator

from nemo_pre.config.derived import FP8_MULTIPLE, bf16_layers, fp8_multiple, fp8_recipe
from nemo_pre.config.run import RunConfig
from nemo_pre.config.schema import PrecisionConfig
from nemo_pre.launch.environment import uses_gpu


def precision_problems(config: RunConfig) -> Iterator[str]:
    """Reasons to refuse, wherever the run is to be."""
    precision, layout, language = config.precision, config.parallel, config.model.language
    recipe = fp8_recipe(precision)
    if recipe is None:
        return
    if recipe == "delayed" and bf16_layers(precision):
        yield "precision.bf16_layers needs fp8_tensorwise or fp8_blockwise: set precision.bf16_layers=null."
    in_a_stage = language.num_layers // layout.pipeline  # as Megatron counts, however uneven the stages are
    if bf16_layers(precision) > in_a_stage:
        yield f"precision.bf16_layers={bf16_layers(precision)} must be at most {in_a_stage}, the layers of a stage."
    head = language.hidden_size // language.num_attention_heads
    multiple = fp8_multiple(recipe, layout.sequence and layout.tensor > 1)
    for name, size, factor in (
        ("hidden_size", language.hidden_size, multiple),
        ("ffn_hidden_size / parallel.tensor", language.ffn_hidden_size // layout.tensor, FP8_MULTIPLE),
        ("query width / parallel.tensor", language.hidden_size // layout.tensor, FP8_MULTIPLE),
        ("key and value width / parallel.tensor", 2 * head * language.num_query_groups // layout.tensor, FP8_MULTIPLE),
    ):
        if size % factor:
            yield (
                f"precision={precision.name} needs {name} divisible by {factor}, not {size}: "
                f"choose precision=bf16, or a smaller parallel.tensor."
            )
    shards = (2 * layout.context if layout.context > 1 else 1) * (layout.tensor if layout.sequence else 1)
    if config.data.sequence_length % (shards * multiple):
        yield (
            f"data.sequence_length={config.data.sequence_length} must be a multiple of {shards * multiple} with "
            f"precision={precision.name} ({multiple} tokens x {shards} shards)."
        )


def precision_of_this_machine(config: RunConfig) -> Iterator[str]:
    """Reasons why the run cannot be here."""
    if fp8_recipe(config.precision) is None:
        return
    if not uses_gpu(config.platform):
        yield f"precision={config.precision.name} needs a GPU and this run has none: choose precision=bf16."
    elif importlib.util.find_spec("transformer_engine") is None:
        yield f"precision={config.precision.name} needs Transformer Engine: install nemo-pre[gpu], or precision=bf16."


def ignored_precision_options(config: RunConfig) -> Iterator[str]:
    precision, recipe = config.precision, fp8_recipe(config.precision)
    if recipe != "delayed" and precision.amax_history != PrecisionConfig().amax_history:
        yield f"precision.amax_history has no effect with precision={precision.name}: it is fp8_delayed's."
    if recipe is None and precision.bf16_layers is not None:
        yield f"precision.bf16_layers has no effect with precision={precision.name}."
