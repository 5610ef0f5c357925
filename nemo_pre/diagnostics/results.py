"""What ``nemo-pre diagnose`` leaves on disk: results.json, which reports and the study read again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

FORMAT, FORMAT_VERSION = "nemo-pre diagnostics", 1
RESULTS, REPORT = "results.json", "report.html"

Results = dict[str, Any]


def read_results(path: str | Path) -> Results:
    """``results.json``, or that of a directory.

    Raises:
        ValueError: there is none, or it is not one of this format.
    """
    file = Path(path) / RESULTS if Path(path).is_dir() else Path(path)
    try:
        results: Results = json.loads(file.read_text(encoding="utf-8"))
        if results["format"] != FORMAT or results["format_version"] != FORMAT_VERSION:
            raise ValueError(f"it states format {results['format']!r} version {results['format_version']!r}")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{file} is not a {RESULTS} of nemo-pre diagnose ({error}): diagnose the model again."
        ) from error
    return results
