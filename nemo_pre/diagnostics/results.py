"""What ``nemo-pre diagnose`` leaves on disk: results.json, which reports and the study read again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from nemo_pre.run_files.json_files import check_type, read_json

FORMAT, FORMAT_VERSION = "nemo-pre diagnostics", 1
FIELDS = {"title": str, "model": dict, "data": dict, "layers": list, "pictures": dict}
RESULTS, REPORT = "results.json", "report.html"

Results = dict[str, Any]


def read_results(path: str | Path) -> Results:
    """``results.json``, or that of a directory.

    Raises:
        ValueError: there is none, or it is not one of this format.
    """
    file = Path(path) / RESULTS if Path(path).is_dir() else Path(path)
    try:
        results: Results = read_json(file, f"a {RESULTS} of nemo-pre diagnose")
        if results["format"] != FORMAT or results["format_version"] != FORMAT_VERSION:
            raise ValueError(f"it states format {results['format']!r} version {results['format_version']!r}")
        for name, kind in FIELDS.items():
            check_type(results[name], kind, f"'{name}'")
        for number, layer in enumerate(results["layers"]):
            check_type(layer, dict, f"layer {number}")
            check_type(layer["layer"], int, f"the number of layer {number}")
        if not results["layers"]:
            raise ValueError("it has no layer")
    except (ValueError, KeyError) as error:
        raise ValueError(
            f"{file} is not a {RESULTS} of nemo-pre diagnose ({error}): diagnose the model again."
        ) from error
    return results
