"""The Hydra config groups of a run, and a thin entry: ``python -m recipes experiment=NAME`` trains."""

from pathlib import Path

DIRECTORY = Path(__file__).parent
PARTS_OF_GROUPS = ("model/language", "model/vision")  # groups of their own, in the directory of another


def groups() -> list[str]:
    """The names of the config groups."""
    own = [path.name for path in DIRECTORY.iterdir() if path.is_dir() and any(path.glob("*.yaml"))]
    return sorted([*own, *PARTS_OF_GROUPS])


def choices(group: str) -> list[str]:
    """The names that ``GROUP=`` accepts."""
    folder = DIRECTORY / group
    others = [DIRECTORY / name for name in PARTS_OF_GROUPS if name != group]
    files = (path for path in folder.rglob("*.yaml") if path.parent not in others)
    return sorted(str(path.relative_to(folder).with_suffix("")) for path in files)
