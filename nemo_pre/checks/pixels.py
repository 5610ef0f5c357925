"""Whether a run shows its imported encoder the pixels that this was trained on."""

from __future__ import annotations

from pathlib import Path

from nemo_pre.config.run import RunConfig
from nemo_pre.run_files.saved_config import FILE, read_saved

NUMBERS = ("model.vision.image_mean", "model.vision.image_std", "data.image_filter")
SHAPE = ("data.image_resize", "data.image_crop_from")


def check_pixels(config: RunConfig) -> list[str]:
    """Compare a run that starts from an import with the image processor that came with it; returns warnings, of what a
    recipe may want otherwise: LLaVA-1.5 pads pictures for a CLIP that was trained on their middles.

    Raises:
        ValueError: another mean, standard deviation or filter.
    """
    if config.init_from is None or not (Path(config.init_from).expanduser() / FILE).is_file():
        return []
    from omegaconf import OmegaConf

    saved = read_saved(Path(config.init_from).expanduser())
    if not OmegaConf.is_missing(saved.trainer, "max_steps"):
        return []  # a run's, whose recipe decided
    run = OmegaConf.structured(config)
    asked = {name: (OmegaConf.select(run, name), OmegaConf.select(saved, name)) for name in (*NUMBERS, *SHAPE)}
    differing = {name: values for name, values in asked.items() if values[0] != values[1]}
    for name in NUMBERS:
        if name in differing:
            value, own = differing[name]
            raise ValueError(
                f"{name}={value} but the image processor that came with init_from={config.init_from} has {own}: set "
                f"{name}={_word(own)}."
            )
    return [
        f"{name}={value} where the image processor that came with init_from={config.init_from} has {own}."
        for name, (value, own) in differing.items()
    ]


def _word(value: object) -> str:
    return str(value).replace(" ", "")
