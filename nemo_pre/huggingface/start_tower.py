"""``vision_from``: the directory of ``transformers`` whose vision tower a run's encoder starts as.

It is compared with the run before anything starts; :mod:`nemo_pre.neva.vision` loads it where the encoder is built.
"""

from __future__ import annotations

from pathlib import Path

from nemo_pre.config.run import RunConfig
from nemo_pre.config.vision_families import FAMILIES, class_tokens, is_native

TOWERS = Path(__file__).resolve().parents[1] / "teaching" / "towers"  # those that come along
SHAPE = (
    *("family", "image_size", "patch_size", "hidden_size", "intermediate_size", "num_layers", "num_attention_heads"),
    "pooling_head",
)


def shipped_towers() -> list[str]:
    """The names of the taught towers that come along."""
    return sorted(path.name for path in TOWERS.iterdir() if path.is_dir())


def tower_directory(vision_from: str) -> Path:
    """The directory that ``vision_from`` names, by the name of a tower that comes along or by its path; ``./NAME`` is
    always a path.

    Raises:
        ValueError: there is none.
    """
    if vision_from in shipped_towers():
        return TOWERS / vision_from
    directory = Path(vision_from).expanduser()
    if not directory.is_dir():
        raise ValueError(
            f"vision_from={vision_from} is not a directory: name that of a vision tower, such as nemo-pre teach "
            f"writes, or one that comes along: {', '.join(shipped_towers())}."
        )
    return directory


def check_vision_from(config: RunConfig) -> None:
    """Compare a run's encoder, and the pixels it would be shown, with those of ``vision_from``.

    Raises:
        ValueError: it is not there or not whole, or something differs, which is named.
    """
    from nemo_pre.huggingface.architecture import read_tower
    from nemo_pre.huggingface.importer import stored_tower
    from nemo_pre.huggingface.pixels import read_pixels

    named, vision = config.vision_from, config.model.vision
    assert named is not None
    if is_native(vision) or FAMILIES[vision.family].classes is None:
        raise ValueError(
            f"vision_from={named} starts no {vision.family}: set it to null, or import the model with nemo-pre import."
        )
    directory = tower_directory(named)
    found = read_tower(directory)
    for field in SHAPE:
        wanted, has = getattr(vision, field), getattr(found, field)
        if wanted != has:
            raise ValueError(
                f"model.vision.{field}={wanted} but the tower of vision_from={named} has {has}: set "
                f"model.vision.{field}={has}, or vision_from=null for random weights."
            )
    assert class_tokens(found) == class_tokens(vision)
    list(stored_tower(config.model, directory, found, config.seed, allow_pickle=False))
    pixels = read_pixels(directory, found)
    shown = {
        "model.vision.image_mean": (list(vision.image_mean), list(pixels.mean)),
        "model.vision.image_std": (list(vision.image_std), list(pixels.std)),
        "data.image_filter": (config.data.image_filter, pixels.image_filter),
    }
    for option, (ours, own) in shown.items():
        if ours != own:
            word = str(own).replace(" ", "")
            raise ValueError(
                f"{option}={ours} but the image processor of vision_from={named} has {own}: set {option}={word}."
            )
