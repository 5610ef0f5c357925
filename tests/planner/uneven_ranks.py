"""On a rank: a checkpoint through an uneven pipeline."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path


def save_again(checkpoint: str, layers: list[int], out: str) -> list[int]:
    """Load a checkpoint into stages of these lengths and save it from there; returns this rank's layers, from 1."""
    from megatron.core import dist_checkpointing

    from nemo_pre.inference import inference_run, load_chunks

    run = inference_run(Path(checkpoint), tempfile.mkdtemp(), pipeline=len(layers), platform="cpu")
    run.parallel.pipeline_layers = layers
    [chunk] = load_chunks(run)
    weights = Path(out) / "weights"
    weights.mkdir(parents=True, exist_ok=True)
    dist_checkpointing.save(chunk.sharded_state_dict(prefix="module."), str(weights))
    shutil.copy(Path(checkpoint) / "config.yaml", out)
    return [layer.layer_number for layer in chunk.language_model.decoder.layers]
