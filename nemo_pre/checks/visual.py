"""What can be decided before a run about visual attention and visual positions."""

from __future__ import annotations

from collections.abc import Iterator

from nemo_pre.config.derived import axis_of_frequency
from nemo_pre.config.run import RunConfig
from nemo_pre.config.vision_families import is_native, kept_class_tokens, merge_size
from nemo_pre.launch.environment import uses_gpu


def visual_problems(config: RunConfig) -> Iterator[str]:
    """What cannot work: attention, positions."""
    model = config.model
    if model.attention_backend == "flex" and not uses_gpu(config.platform):
        yield "model.attention_backend=flex has no backward pass on a CPU: set it to auto, dense or split."
    width = model.language.hidden_size // model.language.num_attention_heads
    try:
        axis_of_frequency(model.rope, model.rope_sections, width // 2)
    except ValueError as error:
        yield str(error)
    if is_native(model.vision):
        yield from _native_run_problems(config)
    crop_from = config.data.image_crop_from
    if config.data.image_resize == "crop" and crop_from is not None and crop_from < model.vision.image_size:
        yield (
            f"data.image_crop_from={crop_from} must be model.vision.image_size={model.vision.image_size} or more: the "
            f"middle is cut out of it."
        )
    if model.rope != "1d" and kept_class_tokens(model.vision):
        yield f"model.rope={model.rope} places a grid of patches: set model.vision.drop_class_token=true."


def _native_run_problems(config: RunConfig) -> Iterator[str]:
    """What is not there for images that differ in their number of visual tokens."""
    family = config.model.vision.family
    if merge_size(config.model.vision) > 1 and config.model.projector != "mlp2x_gelu":
        yield f"model.vision.family={family} has its merger's MLP as projector: set model.projector=mlp2x_gelu."
    if config.data.max_tiles > 1:
        yield f"model.vision.family={family} takes images whole: set data.max_tiles=1."
    if config.trainer.log_diagnostics_every is not None:
        yield (f"trainer.log_diagnostics_every needs a fixed resolution, not {family}'s: set it to null.")


def ignored_visual_options(config: RunConfig) -> Iterator[str]:
    """Options that are set and have no effect."""
    model = config.model
    if is_native(model.vision) and config.data.image_resize != "whole":
        yield f"data.image_resize={config.data.image_resize} has no effect: {model.vision.family} keeps aspect ratios."
    if config.data.image_crop_from is not None and config.data.image_resize != "crop":
        yield f"data.image_crop_from has no effect with data.image_resize={config.data.image_resize}."
    if model.attention == "causal" and model.attention_backend != "auto" and not config.data.packing:
        yield "model.attention_backend has no effect with model.attention=causal and data.packing=false."
    if model.vision.family == "patch_mlp" and config.optim.freeze_vision:
        yield "optim.freeze_vision=true keeps a patch MLP as it was drawn, unless init_from's was trained."
    if config.vision_from is not None and config.init_from is not None:
        yield f"vision_from={config.vision_from} has no effect: init_from={config.init_from} brings an encoder."
    if model.rope == "1d" and model.rope_sections is not None:
        yield "model.rope_sections has no effect with model.rope=1d."
