"""What a run recorded of its probes while it trained: language against vision, step by step."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def over_training(model: str | Path, num_layers: int) -> list[dict[str, Any]]:
    """What was measured at each step of ``trainer.log_diagnostics_every``: ``step``, ``loss`` (nats per token: of
    validation if every such step was validated, else the mean in training since the one before) and the ``probes`` at
    the middle layer, by task.

    Args:
        model: a run's directory, its checkpoints, or one of them; empty if no metrics lie beside.
    """
    from nemo_pre.run_files.metrics import METRICS, read_metrics

    path = Path(model).resolve()
    file = next((place / METRICS for place in (path, *path.parents[:2]) if (place / METRICS).is_file()), None)
    if file is None:
        return []
    by_step: dict[int, dict[str, Any]] = {}
    for line in read_metrics(file):
        by_step.setdefault(line["step"], {}).update(line)
    middle, before = f"/layer_{max(1, num_layers // 2)}", "diagnostics/probe_"
    found: list[dict[str, Any]] = []
    validated: list[float | None] = []
    trained: list[float] = []
    for step, values in sorted(by_step.items()):
        if values.get("lm/loss") is not None:
            trained.append(values["lm/loss"])
        probes = {
            name.removeprefix(before).removesuffix(middle): value
            for name, value in values.items()
            if name.startswith(before) and name.endswith(middle) and value is not None
        }
        if probes and trained:
            found.append({"step": step, "loss": sum(trained) / len(trained), "probes": probes})
            validated.append(values.get("val/lm_loss"))
            trained = []
    if None in validated:
        return found
    return [{**at, "loss": loss} for at, loss in zip(found, validated, strict=True)]
