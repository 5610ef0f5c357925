"""Composing ``recipes/``, a user's own recipes and overrides into a :class:`~nemo_pre.config.run.RunConfig`.

Hydra merges the YAML groups into the dataclasses of the schema, so an unknown key or a value of the wrong type is
refused here. Hydra's errors are several lines long and name its own classes; a user sees one sentence instead.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import recipes
from nemo_pre.config import of_init_from
from nemo_pre.config.run import RunConfig
from nemo_pre.config.schema import ModelConfig
from nemo_pre.config.words import as_override, unknown_option
from nemo_pre.options import nearest, value_problems, with_homes

SCHEMA = "run_schema"  # the name by which recipes/config.yaml inherits the dataclasses


def compose_config(overrides: Sequence[str], held: ModelConfig | None = None) -> Any:
    """The composed OmegaConf config, in which values may still be missing (``???``).

    Args:
        overrides: words of the command line.
        held: the model that ``init_from`` will hold, where its checkpoint is not there yet.

    Raises:
        ValueError: one sentence on an override that names no option, or a value that does not fit.
    """
    from hydra import compose, initialize_config_dir
    from omegaconf import OmegaConf

    schema = _schema()
    _search_own_recipes_too()
    _refuse_search_path(overrides)
    with _one_sentence(), initialize_config_dir(config_dir=str(recipes.DIRECTORY), version_base="1.3"):
        words = list(map(as_override, overrides))
        of_init_from.offer(None if held is None else of_init_from.as_held(held))
        composed = compose("config", overrides=words, return_hydra_config=True)
        choice = composed.hydra.runtime.choices.get("model")
        if held is None and choice in (of_init_from.OF_INIT_FROM, of_init_from.UNNAMED):
            found = of_init_from.held_by(composed, choice)
            if found is not None:
                of_init_from.offer(found)
                composed = compose("config", overrides=words, return_hydra_config=True)
        values = OmegaConf.to_container(composed, resolve=False)
        assert isinstance(values, dict)
        values["experiment"] = _with_origin(values.pop("hydra")["runtime"]["choices"].get("experiment"))
        return OmegaConf.merge(schema, values)  # refuses what a "+key" override added


@functools.cache
def _schema() -> Any:
    """The dataclasses as OmegaConf reads them, which takes a fifth of composing a run; Hydra finds them by a name."""
    from hydra.core.config_store import ConfigStore
    from omegaconf import OmegaConf

    ConfigStore.instance().store(name=SCHEMA, node=RunConfig)
    return OmegaConf.structured(RunConfig)


@functools.cache
def _search_own_recipes_too() -> None:
    """Tell Hydra to look into the user's own recipes behind the packaged ones, whenever it starts."""
    from hydra.core.config_search_path import ConfigSearchPath
    from hydra.core.plugins import Plugins
    from hydra.plugins.search_path_plugin import SearchPathPlugin

    class OwnRecipes(SearchPathPlugin):
        def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
            own = recipes.own_directory()
            if own is not None:
                search_path.append("own recipes", f"file://{own.resolve()}")

    Plugins.instance().register(OwnRecipes)


def _refuse_search_path(overrides: Sequence[str]) -> None:
    """A search path of Hydra's would be passed over in silence where the package has a file of the same name."""
    if any(word.lstrip("+~").startswith("hydra.searchpath") for word in overrides):
        raise ValueError(f"hydra.searchpath cannot be set: name the folder of your recipes by {recipes.OWN_VARIABLE}.")


def _with_origin(experiment: str | None) -> str | None:
    """The experiment's name, and which file it is where it is the user's own: a saved run says so."""
    own = recipes.own_directory()
    file = None if own is None else own / "experiment" / f"{experiment}.yaml"
    return f"{experiment}, from {file}" if file is not None and file.is_file() else experiment


def compose_run(overrides: Sequence[str], held: ModelConfig | None = None) -> RunConfig:
    """The run that ``nemo-pre train OVERRIDES`` describes, complete and typed; ``~`` in its paths is the user's home.
    Arguments: see :func:`compose_config`.

    Raises:
        ValueError: one sentence: an unknown option, a value of the wrong type or off its option's range, or a value
            that is still missing.
    """
    from omegaconf import OmegaConf

    config = compose_config(overrides, held)
    missing = missing_values(config)
    if missing:
        hint = "choose an experiment, e.g. experiment=digits_tiny" if config.experiment is None else "set them"
        raise ValueError(f"The run is not complete, {', '.join(missing)} have no value: {hint}.")
    with _one_sentence():
        run = OmegaConf.to_object(config)
    assert isinstance(run, RunConfig)
    with_homes(run)
    for problem in value_problems(run):  # whoever computes with a run's values may rely on them
        raise ValueError(problem)
    return run


def missing_values(config: Any) -> list[str]:
    """The dotted names of a composed config's values that are still ``???``."""
    from omegaconf import OmegaConf

    def walk(node: Any, name: str) -> Iterator[str]:
        if isinstance(node, dict):
            for key, value in node.items():
                yield from walk(value, f"{name}.{key}" if name else str(key))
        elif node == "???":
            yield name

    return sorted(walk(OmegaConf.to_container(config, resolve=False), ""))


def to_yaml(config: Any) -> str:
    """A composed config or a :class:`RunConfig` as YAML, interpolations resolved where nothing is missing."""
    from omegaconf import OmegaConf

    if isinstance(config, RunConfig):
        config = OmegaConf.create(asdict(config))  # its types were checked: less than half of structured()'s time
    with _one_sentence():
        return OmegaConf.to_yaml(config, resolve=not missing_values(config))


def save_resolved(config: RunConfig, path: str | Path) -> None:
    """Write the run's every value as YAML to ``path``; its directory is made.

    Raises:
        ValueError: a value is off its option's range, which whoever reads the file would refuse.
    """
    for problem in value_problems(config):
        raise ValueError(problem)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(to_yaml(config))


@contextmanager
def _one_sentence() -> Iterator[None]:
    """Turns what Hydra and OmegaConf raise into a ValueError of one sentence."""
    from hydra.errors import HydraException, MissingConfigException
    from omegaconf.errors import OmegaConfBaseException

    try:
        yield
    except MissingConfigException as error:
        raise ValueError(_missing_choice(error)) from error
    except (HydraException, OmegaConfBaseException) as error:
        raise ValueError(_explain(error)) from error


def _missing_choice(error: Exception) -> str:
    text = str(error)
    name = re.search(r"Could not find '(.+?)'", text)
    choices = re.findall(r"^\t(\S+)$", text, re.MULTILINE)
    group, _, choice = (name[1] if name else "config").rpartition("/")
    if not group:
        return f"There is no config group '{choice}': see nemo-pre train --cfg job for what can be set."
    near = nearest(choice, choices)
    if near is not None:
        return f"{group}={choice} does not exist: the nearest is {near}; nemo-pre train --help lists all."
    return f"{group}={choice} does not exist: choose one of {', '.join(choices)}."


def _explain(error: Exception) -> str:
    causes = [error]
    while causes[-1].__cause__ is not None:
        causes.append(causes[-1].__cause__)  # type: ignore[arg-type]
    for cause in reversed(causes):
        key = getattr(cause, "full_key", None)
        if not key:
            continue
        what = str(getattr(cause, "msg", cause)).splitlines()[0]
        if re.search(r"not in struct|not in '", what):
            return unknown_option(key)
        return f"{key} has a value that does not fit: {what.rstrip('.')}."
    first = str(error).splitlines()[0].rstrip(".")
    override = re.match(r"Could not override '(.+?)'", first)
    if override:
        return unknown_option(override[1])
    return f"The overrides cannot be read: {first}."
