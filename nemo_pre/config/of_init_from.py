"""The model that ``init_from`` brings: what its ``config.yaml`` says, as a choice of the group ``model``.

``model=of_init_from`` asks for it, and a run that names no model takes it, so that a model which is in no recipe need
not be described again. Stages, objectives and options of the command line come after it, as after any other model.
"""

from __future__ import annotations

import re
from dataclasses import asdict
from pathlib import Path
from typing import Any

from nemo_pre.config.schema import ModelConfig

OF_INIT_FROM = "of_init_from"  # recipes/model/of_init_from.yaml
UNNAMED = "held_by_init_from"  # what recipes/config.yaml has; the demo's model where nothing is held
DEMO = "digits_tiny"
FILE = "config.yaml"
STEP = re.compile(r"step=(\d+)")  # "-v1" may follow
# How and where a model is run is the run's own affair; the tokenizer is found as nemo_pre.data.tokenizer says.
NOT_BROUGHT = ("tokenizer", "attention_backend")
PIXELS = (
    "image_resize",
    "image_filter",
    "image_crop_from",
)  # of ``data``: the encoder's, as a tower's recipe has them


def offer(held: dict[str, Any] | None) -> None:
    """Make what Hydra finds under both names: ``held`` (sections of a run), or the demo's model."""
    from hydra.core.config_store import ConfigStore

    node, package = ({"defaults": [DEMO]}, None) if held is None else (held, "_global_")
    ConfigStore.instance().store(group="model", name=UNNAMED, node=node, package=package)


def held_by(composed: Any, choice: str) -> dict[str, Any] | None:
    """What the checkpoint holds that a composed run starts from; None where it names none, or none that is there.

    Args:
        composed: the run with the demo's model.
        choice: of the group ``model``.

    Raises:
        ValueError: ``model=of_init_from`` asks for it and it cannot be had, or the file there is not a run's.
    """
    asked = choice == OF_INIT_FROM
    init_from = _init_from(composed)
    if init_from is None:
        if asked:
            raise ValueError(f"model={OF_INIT_FROM} needs init_from=CHECKPOINT, whose path does not hold model.name.")
        return None
    file = _configuration(Path(init_from).expanduser())
    if file is None:
        if asked:
            raise ValueError(
                f"model={OF_INIT_FROM} finds no {FILE} in init_from={init_from}: name a checkpoint that a run or "
                f"nemo-pre import wrote, or a run's checkpoints."
            )
        return None
    return _read(file)


def as_held(model: ModelConfig) -> dict[str, Any]:
    """What a checkpoint will hold that is not there yet, by its model."""
    return {"model": {name: value for name, value in asdict(model).items() if name not in NOT_BROUGHT}}


def _init_from(composed: Any) -> str | None:
    """The run's ``init_from``; None where it follows from the name of the model that is to be found."""
    from omegaconf import OmegaConf, open_dict

    composed = composed.copy()
    unknown = "\0"
    with open_dict(composed):
        OmegaConf.update(composed, "model.name", unknown)
    value = OmegaConf.select(composed, "init_from")
    return None if value is None or unknown in str(value) else str(value)


def _configuration(path: Path) -> Path | None:
    """The file of a checkpoint, or of the furthest of those in a folder: the model is the same in all of a run's."""
    numbered = [(int(found[1]), folder) for folder in path.glob("step=*") if (found := STEP.match(folder.name))]
    folders = [path, *(folder for _, folder in sorted(numbered, reverse=True))]
    return next((folder / FILE for folder in folders if (folder / FILE).is_file()), None)


def _read(file: Path) -> dict[str, Any]:
    import yaml
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        saved = OmegaConf.load(file)
        model = OmegaConf.merge(OmegaConf.structured(ModelConfig), OmegaConf.select(saved, "model") or {})
        values = OmegaConf.to_container(model)
        data = {name: OmegaConf.select(saved, f"data.{name}") for name in PIXELS}
    except (OmegaConfBaseException, OSError, yaml.YAMLError, ValueError, TypeError, RecursionError) as error:
        first = (str(error).strip() or repr(error)).splitlines()[0].rstrip(".:")
        raise ValueError(f"{file} is not a run's configuration: {first}.") from error
    assert isinstance(values, dict)
    brought = {name: value for name, value in values.items() if name not in NOT_BROUGHT}
    return {"model": brought, "data": {name: value for name, value in data.items() if value is not None}}
