"""What data.features saves in training: step time (loading within it), FLOPs and peak memory, with images and with the
frozen encoder's features.

    python -m benchmarks.feature_cache                                      # digits_tiny, on what the machine has
    python -m benchmarks.feature_cache --note "shared machine"

The demo's data are prepared and their features computed first (bfloat16, as ``nemo-pre data features`` writes them);
what that took is in the result. No loader processes: a step reads and decodes its own images or reads its features.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.overhead import Settings, compare, parse_arguments
from nemo_pre.launch.environment import prepare_environment

SCENES = 4000
FROZEN = ["objective=none", "optim.freeze_vision=true"]


def main() -> None:
    note, arguments = take_arguments()
    prepare_environment()
    with tempfile.TemporaryDirectory(prefix="feature-cache-") as scratch:
        data, features = Path(scratch) / "data", Path(scratch) / "features"
        images = [*FROZEN, f"data.path={data}"]
        cached = [*images, f"data.features={features}"]
        computing = compute(data, cached, arguments["model"])
        sides = {"images": images, "features": cached}
        settings = Settings("feature_cache", sides, prepared_data=True, **arguments)
        compare(settings, lambda result: {**_without(scratch, result), "computing": computing, "note": note})


def take_arguments() -> tuple[str, dict[str, Any]]:
    """``--note``, and the options of the other benchmarks."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--note", default="")
    given, sys.argv[1:] = parser.parse_known_args()
    return given.note, parse_arguments("Step time, FLOPs and peak memory with and without the cache of features.")


def compute(data: Path, cached: list[str], model: str) -> dict[str, Any]:
    """Prepare the data and their features; returns seconds and bytes."""
    from data_prep.digits import prepare
    from nemo_pre.verbs.features import features

    prepare(data, num_scenes=SCENES, seed=0, workers=1)
    started = time.perf_counter()
    features(["experiment=digits_tiny", f"model={model}", *cached])
    seconds = time.perf_counter() - started
    directory = Path(cached[-1].partition("=")[2])
    written = sum(path.stat().st_size for path in directory.glob("*-*.safetensors"))
    tars = sum(path.stat().st_size for path in data.glob("*.tar"))
    return {"scenes": SCENES, "seconds": round(seconds, 1), "feature_bytes": written, "shard_bytes": tars}


def _without(scratch: str, result: dict[str, Any]) -> dict[str, Any]:
    """The settings with the directory's name left out, which is another every time."""
    return {"settings": json.loads(json.dumps(result["settings"]).replace(scratch, "SCRATCH"))}


if __name__ == "__main__":
    main()
