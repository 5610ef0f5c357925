"""One screen: a line for every step, and below it what was not as expected."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from benchmarks.gpu.first_contact.harness import BAD, Outcome

SCREEN, WIDTH = 48, 118


def summarise(title: str, outcomes: Sequence[Outcome], results: Sequence[dict[str, Any]]) -> str:
    """The summary's text, of at most one screen.

    Args:
        title: of the machine and of the call.
        results: lines of the results.
    """
    lines = [*title.splitlines(), ""]
    for outcome in outcomes:
        mark = "*" if outcome.word in BAD else " "
        lines.append(f"{mark} {outcome.word:10} {outcome.seconds:6.1f} s  {outcome.step:16} {outcome.what}")
        if outcome.why and (outcome.word in BAD or not outcome.why.endswith("checks")):
            lines.append(f"{'':24}{outcome.why}")
    off = [line for line in results if line["event"] == "check" and not line["ok"]]
    if off:
        lines += ["", "not as expected:"]
        lines += [f"  {line['step']}: {line['name']}: {line['got']}, expected {line['expected']}" for line in off]
    if len(lines) >= SCREEN:
        lines[SCREEN - 2 :] = [f"... and {len(lines) - SCREEN + 2} lines more: results.jsonl has them"]
    counted = {word: sum(outcome.word == word for outcome in outcomes) for word in {each.word for each in outcomes}}
    total = sum(outcome.seconds for outcome in outcomes)
    lines.append(
        ", ".join(f"{number} {word}" for word, number in sorted(counted.items())) + f"; {total:.0f} s in steps"
    )
    return "\n".join(line if len(line) <= WIDTH else line[: WIDTH - 3] + "..." for line in lines) + "\n"
