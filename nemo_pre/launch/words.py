"""What a training says on its terminal; the words of the libraries beneath it go into a file beside the run.

Torch, gloo, Megatron, NeMo and Lightning tell of devices that are not there, of every process group, and of a
checkpoint by a name that it will not have. A user reads what nemo-pre says, and a library's errors; ``--verbose``
brings the rest back.
"""

from __future__ import annotations

import logging
import logging.handlers
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

VERBOSE = "NEMO_PRE_VERBOSE"  # the environment variable that --verbose sets
LIBRARIES = "libraries.log"  # of ranks that a launcher started, whose own output is the launcher's


def is_verbose() -> bool:
    """Whether the libraries' words are wanted too."""
    return bool(os.environ.get(VERBOSE))


def separate_words(log: Path, started_here: bool) -> None:
    """Send what libraries say from now on to the end of ``log``; what nemo-pre says stays on the output of this
    process. Libraries that write by handlers of their own must have been imported.

    Args:
        log: in a folder that exists.
        started_here: standard error, of compiled code too, is the log's; otherwise it stays the launcher's, whose
            record of the job has the last words of a process that dies.
    """
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    shown = [_copy_of(1), _copy_of(2)]
    file = log.open("a", buffering=1, errors="backslashreplace")
    for descriptor in (1, 2) if started_here else (1,):
        os.dup2(file.fileno(), descriptor)
    sys.stdout = shown[0]
    if started_here:
        sys.stderr = file
    for handler in _stream_handlers():
        if isinstance(handler, type(logging.lastResort)):  # it finds standard error whenever it is asked
            handler.setLevel(logging.ERROR)
        else:
            handler.setStream(file)
    logging.captureWarnings(True)
    root = logging.getLogger()
    if not root.handlers:
        root.addHandler(logging.StreamHandler(file))
    root.addHandler(_handler(shown[1], logging.ERROR, "%(levelname)s %(name)s: %(message)s"))
    speak_on(shown[1])


def speak_on(stream: TextIO) -> None:
    """nemo-pre's own words, from INFO on, are lines of ``stream``."""
    own = logging.getLogger("nemo_pre")
    own.setLevel(logging.INFO)
    own.propagate = False  # or they would be said again as a library's
    own.addHandler(_handler(stream, logging.INFO))


def _handler(stream: TextIO, level: int, form: str | None = None) -> logging.Handler:
    handler = logging.StreamHandler(stream)
    handler.setLevel(level)
    handler.setFormatter(_Plain() if form is None else logging.Formatter(form))
    return handler


class _Plain(logging.Formatter):
    """The sentence, which from a warning on says what it is."""

    def format(self, record: logging.LogRecord) -> str:
        text = super().format(record)
        return text if record.levelno < logging.WARNING else f"{record.levelname.lower()}: {text}"


def _copy_of(descriptor: int) -> TextIO:
    return os.fdopen(os.dup(descriptor), "w", buffering=1, errors="backslashreplace")


def _stream_handlers() -> Iterator[logging.StreamHandler[TextIO]]:
    """The handlers by which the loggers of this process write to its output."""
    loggers = [logging.getLogger(), *logging.Logger.manager.loggerDict.values()]
    for logger in loggers:
        for handler in logger.handlers if isinstance(logger, logging.Logger) else []:
            inner = handler.target if isinstance(handler, logging.handlers.MemoryHandler) else handler
            if isinstance(inner, logging.StreamHandler) and not isinstance(inner, logging.FileHandler):
                yield inner
