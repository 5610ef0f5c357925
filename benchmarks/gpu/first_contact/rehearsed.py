"""Rehearses the runs whose peak the first contact measures.

    python -m benchmarks.gpu.first_contact.rehearsed

A rehearsal takes minutes for which a GPU machine has better uses: so its peaks travel as a file, with the digest of
the run that each is of.
"""

from __future__ import annotations

import json

from benchmarks.gpu.first_contact.memory import CASES, REHEARSED, planned_case


def main() -> None:
    from benchmarks.planned_memory import describe
    from nemo_pre.rehearsal.record import digest
    from nemo_pre.rehearsal.run import Wishes, run_rehearsal

    found = {}
    for case in CASES:
        config, planned = planned_case(case)
        rehearsed = run_rehearsal(config, Wishes(messages=False), print)
        found[describe(case)] = {
            "digest": digest(config),
            "peak": rehearsed.besides[0].peak,
            "plan": planned,
            "backend": rehearsed.backend,
            "problems": rehearsed.problems,
        }
        print(json.dumps(found[describe(case)], indent=1))
    REHEARSED.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
