"""Appends its command line to $FAKE_HARNESS_LOG; fails for the task $FAKE_HARNESS_FAILS, with exit code 0 as the real
one does."""

import argparse
import json
import os
import sys
from pathlib import Path

with open(os.environ["FAKE_HARNESS_LOG"], "a") as log:
    log.write(json.dumps({"argv": sys.argv[1:], "offline": os.environ["HF_HUB_OFFLINE"], "cwd": os.getcwd()}) + "\n")
parser = argparse.ArgumentParser()
for name in ("model", "model_args", "tasks", "output_path", "include_path", "batch_size", "limit", "device"):
    parser.add_argument(f"--{name}")
parser.add_argument("--log_samples", action="store_true")
arguments, _ = parser.parse_known_args()
task = arguments.tasks
if task == os.environ.get("FAKE_HARNESS_FAILS"):
    print("Traceback (most recent call last):\nRuntimeError: out of paper")
    sys.exit(0)
METRICS = {"pope": ("pope_accuracy", "pope_f1_score"), "mme": ("mme_perception_score",)}
metrics = {f"{name},none": 0.5 for name in METRICS.get(task, ("exact_match",))}
out = Path(arguments.output_path) / "model"
out.mkdir(parents=True)
results = {task: {"alias": task, **metrics, **{name.replace(",", "_stderr,"): 0.1 for name in metrics}}}
sizes = {task: {"original": 9, "effective": 3}}
(out / "20260101_000000_results.json").write_text(json.dumps({"results": results, "n-samples": sizes}))
samples = [{"doc_id": 0, "exact_match": 1.0}, {"doc_id": 1, "exact_match": 0.0}, {"doc_id": 2}]
lines = "".join(json.dumps(sample) + "\n" for sample in samples)
(out / f"20260101_000000_samples_{task}.jsonl").write_text(lines)
