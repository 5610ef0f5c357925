"""The rank's side: diagnose a checkpoint in a layout."""

from __future__ import annotations

import tempfile
from typing import Any


def diagnose_checkpoint(
    checkpoint: str, data: str, out: str, layout: dict[str, int], batch_size: int, more: dict[str, Any] | None = None
) -> int:
    """Returns how many modules with weights kept what a backward pass would need of them; of the others Megatron lets
    a gradient pass through a layer's sum whatever the mode."""
    from torch.nn.modules.module import register_module_forward_hook

    from nemo_pre.verbs.diagnose import diagnose_rank, diagnose_run

    run = diagnose_run(checkpoint, tempfile.mkdtemp(), platform="cpu", **layout)
    run.data.chat_template = "vicuna_v1"
    run.trainer.micro_batch_size = batch_size
    run.trainer.global_batch_size = batch_size * run.parallel.data
    run.diagnosed_data, run.num_images, run.num_fit = data, 11, 24
    run.out, run.title = out, "a checkpoint"
    for name, value in (more or {}).items():
        setattr(run, name, value)
    with_gradients = []

    def look(module: Any, _: Any, output: Any) -> None:
        first = output[0] if isinstance(output, tuple) else output
        if getattr(first, "grad_fn", None) is not None and list(module.parameters(recurse=False)):
            with_gradients.append(module)

    looking = register_module_forward_hook(look)
    try:
        diagnose_rank(run)
    finally:
        looking.remove()
    return len(with_gradients)


def numbers(value: Any, path: str = "") -> dict[str, float]:
    """Every number in results, by its place."""
    if isinstance(value, dict):
        return {k: v for name, part in value.items() for k, v in numbers(part, f"{path}.{name}").items()}
    if isinstance(value, list):
        return {k: v for n, part in enumerate(value) for k, v in numbers(part, f"{path}.{n}").items()}
    return {path: value} if isinstance(value, int | float) and not isinstance(value, bool) else {}


def classes_of_stripes(resize: str) -> list[list[int]]:
    """By rows, the classes of 4 x 4 patches of a mask of three upright stripes, 1 2 3, twice as wide as high."""
    from types import SimpleNamespace

    import numpy as np
    import torch
    from PIL import Image

    from nemo_pre.diagnostics.megatron import MegatronModel
    from nemo_pre.diagnostics.samples import DiagnosticSample
    from nemo_pre.diagnostics.states import Grid, token_classes

    stripes = np.repeat(np.array([[1] * 24 + [2] * 48 + [3] * 24], np.uint8), 48, axis=0)
    sample = DiagnosticSample("0", Image.new("RGB", (96, 48)), "", Image.fromarray(stripes), torch.zeros(0))
    model = object.__new__(MegatronModel)  # its images alone
    model._how = SimpleNamespace(image_size=48, image_resize=resize, image_crop_from=None)  # type: ignore[assignment]
    classes = token_classes([model._mask_patches(sample, 4)], [Grid(0, 4, 4)], [16], background=None)
    assert classes is not None
    return classes.reshape(4, 4).tolist()
