"""The Hydra config groups of a run, and a thin entry: ``python -m recipes experiment=NAME`` trains."""

from pathlib import Path

DIRECTORY = Path(__file__).parent


def groups() -> list[str]:
    """The names of the config groups."""
    return sorted(path.name for path in DIRECTORY.iterdir() if path.is_dir() and any(path.glob("*.yaml")))


def choices(group: str) -> list[str]:
    """The names that ``GROUP=`` accepts."""
    folder = DIRECTORY / group
    return sorted(str(path.relative_to(folder).with_suffix("")) for path in folder.rglob("*.yaml"))
