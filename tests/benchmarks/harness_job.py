"""A harness of steps that misbehave, in a process of its own: it ends whatever that process has started."""

import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.gpu.first_contact import harness, record
from benchmarks.gpu.first_contact.harness import Harness, Step
from benchmarks.gpu.first_contact.summary import summarise

HOST_MEMORY = 300 << 20
STEPS = {
    "good": "check(True)",
    "off": "check(True); check(False)",
    "nan": "record.Record(path, name, False).at_most('a number', float('nan'), 1)",
    "silent": "pass",
    "absent": "record.Record(path, name, False).line('absent', why='it is not there')",
    "exits": "check(True); print('the reason'); sys.exit(3)",
    "segfaults": "check(True); os.kill(os.getpid(), 11)",
    "half_a_line": "check(True); open(path, 'a').write('{\"step\": '); os.kill(os.getpid(), 9)",
    "device_full": "sys.exit('torch.OutOfMemoryError: CUDA out of memory. Tried to allocate')",
    # A child of the child, in a session of its own, that ignores all it may and holds the output.
    "hangs": "import signal; signal.signal(15, signal.SIG_IGN)\n"
    "if os.fork() == 0:\n"
    "    os.setsid()\n"
    "    if os.fork() == 0:\n"
    "        signal.signal(15, signal.SIG_IGN); open(path + '.left', 'a').write(f'{os.getpid()}\\n')\n"
    "        time.sleep(600)\n"
    "    os._exit(0)\n"
    "print('waiting'); time.sleep(600)",
    # It ends well and leaves a process behind.
    "leaves": "check(True)\n"
    "if os.fork() == 0:\n"
    "    os.setsid(); open(path + '.left', 'a').write(f'{os.getpid()}\\n'); time.sleep(600)\n",
    "fills": "held = []\nwhile True: held.append(bytearray(os.urandom(1 << 20)) * 8)",
    "floods": "check(True); print('first')\nfor _ in range(200): print('x' * (1 << 16))\nprint('last')",
    "asleep": "check(True); time.sleep(600)",
    "later": "check(True)",
}
PRELUDE = """
import os, sys, time
from pathlib import Path
from benchmarks.gpu.first_contact import record
name, path = sys.argv[1], sys.argv[2]
def check(ok): record.Record(Path(path), name, False).check('it', ok, 'True', ok)
sys.stdin.readline()
"""


def step(name: str, out: Path, limit: float, least: float) -> Step:
    command = [sys.executable, "-u", "-c", PRELUDE + STEPS[name], name, str(out / "results.jsonl")]
    return Step(name, f"a step that is {name}", command, limit, least, gated=True)


def main(out: Path, seconds: float, limit: float, names: Sequence[str]) -> None:
    steps = [step(name, out, limit, least=0.5 if name != "later" else 30) for name in names]
    end = time.monotonic() + seconds
    run = Harness(steps, out, end, lambda *given: summarise("a title", *given), HOST_MEMORY, ahead=2)
    whole = run.run()
    words = {each.step: [each.word, each.why] for each in run.outcomes}
    (out / "outcomes.json").write_text(json.dumps({"whole": whole, "words": words}))


if __name__ == "__main__":
    assert harness and record
    main(Path(sys.argv[1]), float(sys.argv[2]), float(sys.argv[3]), sys.argv[4].split(","))
