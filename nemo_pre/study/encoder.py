"""An encoder that sees, and the models that a study's first stages start from.

Both methods start from an encoder that was trained on pictures. digits_tiny's, trained from random weights by answers
alone, gives visual tokens that are nearly alike, and what they do not hold cannot get lost in the decoder
(docs/experiments.md). So the study first teaches the encoder to name what each patch shows, and keeps it frozen.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemo_pre.study.language import prepare_language
from nemo_pre.study.runs import run_verb
from nemo_pre.teaching.training import train

if TYPE_CHECKING:
    import torch

    from nemo_pre.config.run import RunConfig
    from nemo_pre.diagnostics.samples import DiagnosticSample

ENCODER, DESCRIPTION, VISION = "encoder", "encoder.json", "vision"
BATCH, LEARNING_RATE = 128, 2e-3

Pictures = tuple["torch.Tensor", "torch.Tensor"]  # pixels [N, 3, H, W] and classes [N, patches], NOTHING where none


def prepare_encoder(run: RunConfig, data: str, runs: Path, steps: int, device: str) -> dict[str, Any]:
    """``runs/encoder``: the run's tower, trained for ``steps`` steps to name each patch; as it is if it is there.

    Returns:
        What it was made with, and ``accuracy``: on val patches that show an object.

    Raises:
        ValueError: it is there, made with something else; the data have no masks; or the tower is a patch MLP or has
            native resolution.
    """
    import dataclasses

    from nemo_pre.config.vision_families import is_native
    from nemo_pre.huggingface.atomic import appearing

    vision = run.model.vision
    if not vision.num_layers or is_native(vision):
        raise ValueError(f"encoder_steps trains no {vision.family}: give encoder_steps=0, or another encoder.")
    made_with = {"steps": steps, "data": data, "seed": run.seed, "vision": dataclasses.asdict(vision)}
    directory = runs / ENCODER
    if directory.exists():
        found: dict[str, Any] = json.loads((directory / DESCRIPTION).read_text())
        if {name: found[name] for name in made_with} != made_with:
            raise ValueError(f"{directory} was made with other options: remove it, or give another runs=DIRECTORY.")
        return found
    with appearing(directory) as unfinished:
        accuracy = _train(run, data, unfinished / VISION, steps, device)
        (unfinished / DESCRIPTION).write_text(json.dumps({**made_with, "accuracy": accuracy}, indent=1) + "\n")
    return {**made_with, "accuracy": accuracy}


def start_directory(runs: Path, seed: int) -> Path:
    return runs / f"start_seed{seed}"


def prepare_start(run: RunConfig, runs: Path, seed: int, language_steps: int, device: str) -> None:
    """``runs/start_seedN``: the encoder with its seed's language model and a projector of random weights, imported.

    Raises:
        RunFailed: the import failed.
        ValueError: the language model is there, made with something else.
    """
    language = prepare_language(run, runs, seed, language_steps, device)
    target = start_directory(runs, seed)
    if target.exists():
        return
    parts = [f"vision={runs / ENCODER / VISION}", f"language={language}", f"out={target}", f"seed={seed}"]
    words = [*parts, f"feature_layer={run.model.vision.feature_layer}"]
    run_verb("import", words, f"start, seed {seed}", runs / f"{target.name}.log", {})


# --- naming patches -------------------------------------------------------------------------------------------------


def _train(run: RunConfig, data: str, out: Path, steps: int, device: str) -> float:
    import torch
    from torch import nn

    from nemo_pre.diagnostics.patches import NOTHING
    from nemo_pre.huggingface.processor import image_processor
    from nemo_pre.neva.vision import VisionTowerConfig, encoder_features

    (pixels, classes), (val_pixels, val_classes) = _pictures(run, data)
    torch.manual_seed(run.seed)
    layer, num_patches = run.model.vision.feature_layer, classes.shape[1]
    tower: Any = VisionTowerConfig(run.model.vision, run.seed).configure_model().to(device)
    names = nn.Linear(run.model.vision.hidden_size, int(classes.max()) + 1).to(device)

    def loss_of_a_batch() -> torch.Tensor:
        chosen = torch.randint(len(pixels), (BATCH,))
        scores = names(encoder_features(tower, pixels[chosen].to(device), layer, num_patches))
        return nn.functional.cross_entropy(
            scores.flatten(0, 1), classes[chosen].flatten().to(device), ignore_index=NOTHING
        )

    train([*tower.parameters(), *names.parameters()], loss_of_a_batch, steps, LEARNING_RATE, "encoder")
    right = shown = 0
    with torch.no_grad():
        for some, truth in zip(val_pixels.split(BATCH), val_classes.split(BATCH), strict=True):
            found = names(encoder_features(tower, some.to(device), layer, num_patches)).argmax(-1).cpu()
            right += int((found == truth)[truth > 0].sum())
            shown += int((truth > 0).sum())
    tower.cpu().save_pretrained(out)
    image_processor(run.model, run.data).save_pretrained(out)
    return right / shown


def _pictures(run: RunConfig, data: str) -> tuple[Pictures, Pictures]:
    """Every picture of the train and of the val split.

    Raises:
        ValueError: there are no masks.
    """
    from nemo_pre.diagnostics.samples import read_data

    everything = 1 << 62
    found = read_data(data, everything, everything)
    if not (found.has_masks and found.fit and found.background == 0):
        raise ValueError(f"{data} has no masks of digits in a train split: give encoder_steps=0, or other data.")
    return _labelled(run, found.fit_samples()), _labelled(run, found.test_samples())


def _labelled(run: RunConfig, samples: Any) -> Pictures:
    import torch

    pixels, classes = zip(*(_one(run, sample) for sample in samples), strict=True)
    return torch.stack(pixels), torch.stack(classes)


def _one(run: RunConfig, sample: DiagnosticSample) -> tuple[torch.Tensor, torch.Tensor]:
    import numpy as np
    import torch

    from nemo_pre.data.images import image_tensor
    from nemo_pre.diagnostics.patches import patch_classes
    from nemo_pre.diagnostics.states import square_patches

    vision, data = run.model.vision, run.data
    look = (vision.image_mean, vision.image_std, sample.key)
    resize = (data.image_resize, data.image_filter, data.image_crop_from)
    assert sample.mask is not None
    mask = torch.from_numpy(np.array(sample.mask.resize((vision.image_size,) * 2, 0)))  # 0: nearest
    side = vision.image_size // vision.patch_size
    classes = patch_classes(square_patches(mask[None].long(), side, side)[..., 0], background=0)
    return image_tensor(sample.picture, vision.image_size, *look, *resize), classes
