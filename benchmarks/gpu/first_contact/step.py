"""One step's process: import ahead, wait at the gate, do the step, and say how it ended."""

from __future__ import annotations

import faulthandler
import importlib
import os
import signal
import sys
from pathlib import Path

from benchmarks.gpu.first_contact import processes
from benchmarks.gpu.first_contact.contact import BY_NAME
from benchmarks.gpu.first_contact.record import Absent, Record, StopsHere
from nemo_pre.launch.environment import prepare_environment
from nemo_pre.orphans import die_with


def main() -> None:
    """Arguments: the step's name, the file of the results, and ``cpu`` or ``gpu``."""
    name, results, where = sys.argv[1:]
    die_with(os.getppid())
    processes.first_to_go()
    faulthandler.enable()
    faulthandler.register(signal.SIGUSR1)
    prepare_environment("cpu" if where == "cpu" else "auto")
    step = BY_NAME[name]
    # What fails to import here fails again, and is seen, behind the gate.
    failed = []
    for module in step.imports:
        try:
            importlib.import_module(module)
        except Exception as error:
            failed.append(f"{module}: {type(error).__name__}: {error}")
    if not sys.stdin.readline():
        return  # whoever keeps the gate is gone
    for words in failed:
        print(f"could not be imported: {words}", flush=True)
    record = Record(Path(results), name, where == "cpu")
    module, _, function = step.does.partition(":")
    try:
        getattr(importlib.import_module(f"benchmarks.gpu.first_contact.{module}"), function)(record, *step.arguments)
    except StopsHere as stop:
        record.line("stops", why=f"the first call that only a GPU answers: {stop}")
    except Absent as absent:
        record.line("absent", why=str(absent))


if __name__ == "__main__":
    main()
