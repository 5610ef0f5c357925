"""In place of ``nemo-pre train`` and ``nemo-pre diagnose``: processes that write what those would, at once."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from nemo_pre.diagnostics.results import FORMAT, FORMAT_VERSION

LAYERS = 8
EFFECT = {"baseline": 0.0, "pre": 0.1, "mixed_2d": 0.0, "mim": -0.1, "mim_ga": 0.02, "laver": 0.05}


class Processes:
    """Records the commands; a run whose directory holds a name of ``failing`` fails in training."""

    def __init__(self) -> None:
        self.commands: list[list[str]] = []
        self.failing: set[str] = set()

    def __call__(self, command: list[str], stdout: Any, **_: Any) -> subprocess.CompletedProcess[str]:
        verb, *words = command[command.index("nemo_pre.cli") + 1 :]  # behind what ends it with the study
        self.commands.append([verb, *words])
        if verb == "train":
            directory = Path(next(word for word in words if word.startswith("output_dir=")).partition("=")[2])
            if any(name in directory.name for name in self.failing):
                stdout.write("ValueError: no luck\n")
                return subprocess.CompletedProcess(command, 1)
            _train(directory)
        elif verb == "diagnose":
            _diagnose(Path(words[0]), Path(words[2]))
        return subprocess.CompletedProcess(command, 0)

    def stand_in(self, monkeypatch: Any) -> None:
        """In place of the study's own way to run a process; what libraries run is run."""
        seen = SimpleNamespace(run=self, STDOUT=subprocess.STDOUT)
        monkeypatch.setattr("nemo_pre.study.runs.subprocess", seen)

    def verbs(self) -> list[tuple[str, str]]:
        """(verb, run's directory) in order."""
        return [
            (verb, Path(words[0] if verb == "diagnose" else words[-1].partition("=")[2]).name)
            for verb, *words in self.commands
        ]


def arm_and_seed(directory: Path) -> tuple[str, int]:
    arm, _, seed = directory.name.rpartition("_seed")
    return arm, int(seed)


def _train(directory: Path) -> None:
    arm, seed = arm_and_seed(directory)
    right = 0.3 + EFFECT.get(arm, 0.0) + 0.001 * seed
    lines = [
        {"step": 1, "val/lm_loss": 2.0, "diagnostics/seconds": 1.0, "diagnostics/probe_count/layer_4": 0.2},
        {"step": 2, "lm/loss": 1.0},
        {"step": 2, "val/lm_loss": 1.0 - EFFECT.get(arm, 0.0), "val/exact_match": right, "val/answers": 10.0}
        | {"val/exact_match/count": right, "val/answers/count": 5.0},
        {"step": 2, "diagnostics/seconds": 1.0, "diagnostics/probe_count/layer_4": right},
    ]
    (directory / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def _diagnose(run: Path, out: Path) -> None:
    arm, seed = arm_and_seed(next(place for place in (run, *run.parents) if "_seed" in place.name))
    out.mkdir(parents=True, exist_ok=True)
    layers = [
        {
            "layer": layer,
            **dict.fromkeys(
                ("pairwise_cosine", "cohesion", "coupling", "contrast_difference"), 0.1 * layer + 0.01 * seed
            ),
            **dict.fromkeys(("redundancy", "cka_to_layer_0"), 0.5),
            "effective_dimension": 10 - layer + seed,
            "attention_to_visual": 0.3 if layer else None,
            "objects": {"concept": {"accuracy": 0.5 - 0.01 * layer + EFFECT.get(arm, 0.0) + 0.001 * layer * seed}},
            "probe": {"count": {"accuracy": 0.6 - 0.02 * layer + EFFECT.get(arm, 0.0) + 0.001 * layer * seed}},
        }
        for layer in range(LAYERS + 1)
    ]
    rest: dict[str, Any] = {"title": arm, "model": {}, "data": {}, "pictures": {}, "logit_lens": []}
    rest["text"] = {"loss": 3.0 + 0.01 * seed + (0.5 if "step=" in run.name else 0.0)}
    (out / "results.json").write_text(
        json.dumps({"format": FORMAT, "format_version": FORMAT_VERSION, "layers": layers, **rest})
    )
