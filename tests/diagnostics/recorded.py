"""Results as ``nemo-pre diagnose`` writes them, made up without a model."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import numpy as np
from PIL import Image

from nemo_pre.diagnostics.pictures import KeptTokens, heat_maps, tsne_pictures
from nemo_pre.diagnostics.results import FORMAT, FORMAT_VERSION
from nemo_pre.diagnostics.states import Grid

LAYERS, SIDE, WIDTH = 8, 6, 16


def results(title: str, shift: float = 0.0) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    kept = KeptTokens(LAYERS, shown=lambda sample: sample.picture)
    for _ in range(3):
        kept.pictures.append(Image.fromarray(rng.integers(0, 255, (48, 48, 3), np.uint8)))
        kept.grids.append(Grid(0, SIDE, SIDE))
        kept.classes.append(rng.integers(0, 4, SIDE * SIDE))
        for layer in kept.layers:
            kept.tokens.setdefault(layer, []).append(rng.normal(size=(SIDE * SIDE, WIDTH)).astype(np.float32))
    names = {0: "background", **{digit + 1: f"digit {digit}" for digit in range(3)}}
    return {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "title": title,
        "model": {"source": "Hugging Face", "path": "somewhere"},
        "data": {
            "path": "data/digits",
            "images": 64,
            "probe_fit_images": 128,
            "probe_tasks": [{"name": "count", "size": 10, "several": False}],
            "masks": True,
        },
        "layers": [_layer(layer, shift) for layer in range(LAYERS + 1)],
        "logit_lens": [{"token": 7, "text": "sky", "share": 0.6}, {"token": 8, "text": "<br>", "share": 0.1}],
        "over_training": [
            {"step": step, "loss": 3 / step, "probes": {"count": 0.1 * step + shift}} for step in range(1, 5)
        ],
        "pictures": {
            "heat_maps": [asdict(maps) for maps in heat_maps(kept, names)],
            "tsne": tsne_pictures(kept, names),
        },
    }


def _layer(layer: int, shift: float) -> dict[str, Any]:
    value = 0.1 + 0.05 * layer + shift
    return {
        "layer": layer,
        **dict.fromkeys(("pairwise_cosine", "cohesion", "coupling", "contrast_difference", "redundancy"), value),
        "contrast": None if layer == 3 else 1 + value,
        "images_with_contrast": 60,
        "visual_tokens": 2304,
        "width": WIDTH,
        "effective_dimension": 3 + layer,
        "cka_to_layer_0": 1 - 0.1 * layer,
        "length": 10.0 + layer,
        "distance_to_layer_0": 0.1 * layer,
        "attention_to_visual": None if layer == 0 else value,
        "attention_to_visual_by_head": None if layer == 0 else [value, value],
        "probe": {
            "count": {"accuracy": value, "low": value - 0.05, "high": value + 0.05, "most_frequent": 0.2, "alpha": 1.0}
        },
    }
