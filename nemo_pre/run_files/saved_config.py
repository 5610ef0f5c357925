"""The configuration that lies in a checkpoint, of a run or of an import."""

from __future__ import annotations

from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

from nemo_pre.config.run import RunConfig
from nemo_pre.config.schema import ModelConfig
from nemo_pre.options import value_problems

FILE = "config.yaml"
# Fields of the model that say how it is run or named, and not which weights it has.
NOT_WEIGHTS = (
    "name",
    "tokenizer",
    "attention",
    "attention_backend",
    "rope",
    "rope_sections",
    "vision.image_mean",
    "vision.image_std",
    "vision.feature_layer",
    "vision.min_visual_tokens",
    "vision.max_visual_tokens",
    "vision.drop_class_token",
    "language.init_std",
    "language.max_position_embeddings",
)


def read_saved(checkpoint: str | Path) -> Any:
    """The configuration in a checkpoint as OmegaConf, with the schema's types and defaults; an import's lacks what
    belongs to a run.

    Raises:
        ValueError: there is none, or it is not ours.
    """
    import yaml
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    path = Path(checkpoint) / FILE
    if not path.is_file():
        raise ValueError(f"{checkpoint} has no {FILE}: name a checkpoint that a run or nemo-pre import wrote.")
    try:
        return OmegaConf.merge(OmegaConf.structured(RunConfig), OmegaConf.load(path))
    except (OmegaConfBaseException, OSError, yaml.YAMLError, ValueError, TypeError, RecursionError) as error:
        first = (str(error).strip() or repr(error)).splitlines()[0].rstrip(".:")
        raise ValueError(f"{path} is not a run's configuration: {first}.") from error


def saved_model(checkpoint: str | Path) -> ModelConfig:
    """The model a checkpoint holds."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        model = OmegaConf.to_object(read_saved(checkpoint).model)
    except OmegaConfBaseException as error:
        first = str(error).splitlines()[0].rstrip(".")
        raise ValueError(f"{Path(checkpoint) / FILE} describes no whole model: {first}.") from error
    assert isinstance(model, ModelConfig)
    for problem in value_problems(model, "model."):
        raise ValueError(f"{Path(checkpoint) / FILE}: {problem}")
    return model


def saved_run(checkpoint: str | Path) -> RunConfig:
    """The run that wrote a checkpoint.

    Raises:
        ValueError: no run did.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    found = read_saved(checkpoint)
    try:
        saved = OmegaConf.to_object(found)
    except OmegaConfBaseException as error:
        raise ValueError(
            f"{Path(checkpoint) / FILE} is not of a complete run, {str(error).splitlines()[0].rstrip('.')}: name a "
            f"checkpoint like that with init_from, and run in another output_dir."
        ) from error
    assert isinstance(saved, RunConfig)
    return saved


def check_same_weights(model: ModelConfig, checkpoint: str | Path) -> None:
    """Refuse a checkpoint whose weights belong to another model.

    Raises:
        ValueError: one sentence on the first field that differs.
    """
    check_same_model(model, saved_model(checkpoint), str(checkpoint))


def check_same_model(model: ModelConfig, other: ModelConfig, owner: str) -> None:
    """Refuse to start from weights of another model.

    Args:
        model: of the run.
        other: whose weights it is to start with.
        owner: what has those, as it stands in the sentence.

    Raises:
        ValueError: one sentence on the first field that differs.
    """
    wanted, found = flat(model), flat(other)
    for name, value in wanted.items():
        if name not in NOT_WEIGHTS and found[name] != value:
            raise ValueError(
                f"model.{name}={value} but {owner} was made with {found[name]}: choose the model it holds, which "
                f"model=of_init_from takes from it."
            )


def flat(values: Any, prefix: str = "") -> dict[str, Any]:
    """The options in a dataclass, and in those inside it, by their full names."""
    found: dict[str, Any] = {}
    for name in (field.name for field in fields(values)):
        value = getattr(values, name)
        if is_dataclass(value):
            found |= flat(value, f"{prefix}{name}.")
        elif isinstance(value, list):
            found[prefix + name] = [vars(each) if is_dataclass(each) else each for each in value]
        else:
            found[prefix + name] = value
    return found
