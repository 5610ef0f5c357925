"""Which benchmarks' data lie in the local cache of ``datasets``, and how to get the others there."""

from __future__ import annotations

import glob
import os
from pathlib import Path

DataSet = tuple[str, str | None]  # repository, configuration


def cache_directory() -> Path:
    """Where ``datasets`` keeps what it has prepared: the only place it reads without the network."""
    home = os.environ.get("HF_HOME") or os.path.join(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "huggingface")
    return Path(os.environ.get("HF_DATASETS_CACHE") or os.path.join(home, "datasets")).expanduser()


def is_cached(data: DataSet) -> bool:
    """Whether a finished copy is there: ``REPOSITORY/CONFIGURATION/VERSION/HASH/*.arrow``."""
    from datasets.naming import camelcase_to_snakecase

    repository, configuration = data
    *owner, name = repository.split("/")
    folder = cache_directory() / "___".join([*owner, camelcase_to_snakecase(name)])
    version = os.path.join(glob.escape(str(folder)), glob.escape(configuration) if configuration else "*", "*", "*")
    return any(
        Path(found).is_dir()
        and not found.endswith((".incomplete", "_builder.lock"))
        and any(Path(found).glob("*.arrow"))
        for found in glob.glob(version)
    )


def how_to_get(missing: list[DataSet]) -> str:
    """Commands for a machine with a network, and where the result goes."""
    calls = [f"load_dataset({repository!r}{f', {part!r}' if part else ''})" for repository, part in missing]
    lines = [f'  HF_HOME=hf python -c "from datasets import load_dataset; {call}"' for call in calls]
    return "\n".join(
        [
            "On a machine with a network:",
            *lines,
            f"then copy the content of hf/datasets to {cache_directory()}, or run with missing=download.",
        ]
    )
