"""Which line of code does something: the innermost frames that are the project's or its libraries'."""

from __future__ import annotations

import sys

OURS = "/nemo_pre/"
LIBRARIES = ("/megatron/", "/nemo/", "/transformers/", "/lightning/")
NOT_TOLD = ("/nemo_pre/rehearsal/", "/nemo_pre/compat/rehearsed_", "/nemo_pre/compat/cpu_")
BACKWARD = "the backward pass"  # autograd's thread runs no line of Python


def line_of_code(depth: int = 1) -> str:
    """The innermost ``depth`` lines, innermost first, each as ``package/module.py:number``."""
    found: list[str] = []
    frame = sys._getframe(1)
    while frame is not None and len(found) < depth:
        file = frame.f_code.co_filename
        if (OURS in file and not any(part in file for part in NOT_TOLD)) or any(part in file for part in LIBRARIES):
            found.append(f"{_short(file)}:{frame.f_lineno}")
        frame = frame.f_back  # type: ignore[assignment]
    return " < ".join(found) or BACKWARD


def _short(file: str) -> str:
    for package in (OURS, *LIBRARIES):
        if package in file:
            return package[1:] + file.rpartition(package)[2]
    return file
