"""The call: unpack, settle the environment, run the steps, print the summary."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from benchmarks.gpu.first_contact import contact, record, surroundings
from benchmarks.gpu.first_contact.harness import BAD, Harness
from benchmarks.gpu.first_contact.summary import summarise
from nemo_pre.launch.environment import machine_memory, visible_gpus

DEADLINE = 455  # seconds of a call of 480
OF_MEMORY = 0.8  # of the host's, that a step may have


@contextmanager
def scratch_folder() -> Iterator[str]:
    """A folder that is removed by a process of its own: thirty thousand files take longer than the call has left."""
    folder = tempfile.mkdtemp(prefix="first-contact-")
    try:
        yield folder
    finally:
        subprocess.Popen(["rm", "-rf", folder], start_new_session=True)


def main() -> None:
    """Ends with 0 if all steps are as expected, else with 1; after a signal with 143."""
    parser = argparse.ArgumentParser(prog="benchmarks/gpu/first_contact.sh", description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--packs", type=Path, help="folder of *.tar.xz and *.whl for PYTHONPATH")
    parser.add_argument("--on-cpu", action="store_true", help="rehearse: at small size, up to the first CUDA call")
    parser.add_argument("--deadline", type=float, help=f"seconds of the whole call; default {DEADLINE}, on a CPU none")
    parser.add_argument("--only", type=lambda names: names.split(","), default=[], help="steps, with commas")
    parser.add_argument("--began", type=float, default=time.time(), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    began = time.monotonic() - (time.time() - arguments.began)
    out: Path = arguments.out
    results = out / "results.jsonl"
    if results.exists():
        sys.exit(f"{out} holds the results of another call: name another folder.")
    try:
        contact.check(arguments.only)
        out.mkdir(parents=True, exist_ok=True)
        (out / "summary.txt").write_text(
            "First contact: the packs are unpacked and CUDA is looked for; no step began.\n"
        )
        with scratch_folder() as scratch:
            environment = {**os.environ, "TMPDIR": scratch, "HF_HUB_OFFLINE": "1"}
            packs = surroundings.unpack(arguments.packs, Path(scratch) / "site") if arguments.packs else []
            environment, found = surroundings.settle(sys.executable, environment, packs)
            # Both must say so: a GPU that is taken for none would cost the call.
            on_cpu = arguments.on_cpu or (found["no GPU"] is not None and not visible_gpus())
            if on_cpu:
                environment["CUDA_VISIBLE_DEVICES"] = ""
            seconds = round(time.monotonic() - began, 1)
            record.append(results, {"step": "call", "event": "fact", "name": "surroundings", "value": found})
            record.append(results, {"step": "call", "event": "fact", "name": "seconds before", "value": seconds})
            where = f"a rehearsal on a CPU ({found['no GPU'] or 'as asked for'})" if on_cpu else "on a GPU"
            title = f"First contact, {where}, {time.strftime('%F %T', time.gmtime())} UTC"
            title += f"\n{seconds} s before the first step; Transformer Engine {found['Transformer Engine']}"
            harness = Harness(
                contact.steps(arguments.only, results, on_cpu),
                out,
                began + (arguments.deadline or (86_400 if on_cpu else DEADLINE)),
                lambda outcomes, lines: summarise(title, outcomes, lines),
                int(OF_MEMORY * machine_memory()),
                ahead=len(os.sched_getaffinity(0)) // 4,
                on_cpu=on_cpu,
                environment=environment,
            )
            to_the_end = harness.run()
            print((out / "summary.txt").read_text(), flush=True)
    except ValueError as error:
        sys.exit(str(error))
    sys.exit(143 if not to_the_end else int(any(outcome.word in BAD for outcome in harness.outcomes)))


if __name__ == "__main__":
    main()
