"""The Hydra config groups of a run, and a thin entry: ``python -m recipes experiment=NAME`` trains.

A user's own recipes are found beside these: in the folder ``recipes`` of the working directory, or in the one that
``NEMO_PRE_RECIPES`` names instead.
"""

import os
from pathlib import Path

DIRECTORY = Path(__file__).parent  # of the recipes that come with the package
OWN_VARIABLE = "NEMO_PRE_RECIPES"
PARTS_OF_GROUPS = ("model/language", "model/vision")  # groups of their own, in the directory of another


def own_directory() -> Path | None:
    """The folder of the user's own recipes; None where there is none, and in a clone, whose recipes are the package's.

    Raises:
        ValueError: the variable names no folder, a file there has the name of one that comes with the package, or the
            folder could be imported in the package's place.
    """
    named = os.environ.get(OWN_VARIABLE)
    own = Path(named or "recipes")
    if not own.is_dir():
        if named:
            raise ValueError(f"{OWN_VARIABLE}={named} is not a folder: name the one with your recipes, or unset it.")
        return None
    if own.samefile(DIRECTORY):
        return None
    for packaged in sorted(DIRECTORY.rglob("*.yaml")):
        file = own / packaged.relative_to(DIRECTORY)
        if file.exists():
            raise ValueError(
                f"{file} has the name of {packaged}, which comes with nemo-pre: give yours another name, or work "
                f"outside of that folder."
            )
    module = own / "__init__.py"
    if module.exists():
        raise ValueError(f"{module} lets `python -m nemo_pre.cli` take your recipes for nemo-pre's own: remove it.")
    return own


def directories() -> list[Path]:
    """Where recipes are found: the package's directory, and the user's own if there is one."""
    own = own_directory()
    return [DIRECTORY] if own is None else [DIRECTORY, own]


def groups() -> list[str]:
    """The names of the config groups."""
    named = [path.name for path in DIRECTORY.iterdir() if path.is_dir() and any(path.glob("*.yaml"))]
    return sorted([*named, *PARTS_OF_GROUPS])


def choices(group: str) -> list[str]:
    """The names that ``GROUP=`` accepts, the user's own among them."""
    return sorted(name for directory in directories() for name in _names(directory, group))


def find(group: str, name: str) -> Path:
    """The file that ``GROUP=NAME`` chooses.

    Raises:
        ValueError: there is none.
    """
    for directory in directories():
        file = directory / group / f"{name}.yaml"
        if file.is_file():
            return file
    raise ValueError(f"{group}={name} does not exist: choose one of {', '.join(choices(group))}.")


def _names(directory: Path, group: str) -> list[str]:
    folder = directory / group
    others = [directory / name for name in PARTS_OF_GROUPS if name != group]
    files = (path for path in folder.rglob("*.yaml") if path.parent not in others)
    return [path.relative_to(folder).with_suffix("").as_posix() for path in files]
