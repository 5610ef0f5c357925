"""PRe's and LaVer's losses at the size of a 7B micro-batch, against plain expressions that autograd differentiates.

    python -m benchmarks.losses                     # on a GPU 4 images of 576 tokens in bf16; on a CPU one, in float32

Forward and backward take turns on the same tensors; memory is what a pair of passes allocates beyond its inputs (on a
CPU, what autograd keeps). With ``torch.compile`` the plain expression is measured too where it compiles.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
IMAGE, HIDDEN, LOGITS = 576, 4096, 8192  # visual tokens of an image, a 7B decoder's width, LaVer's head
ROUNDS, WARM_UP = 10, 3


def main() -> None:
    import torch

    on_gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description="PRe's and LaVer's losses against plain expressions.")
    parser.add_argument("--images", type=int, default=4 if on_gpu else 1)
    parser.add_argument("--compile", action="store_true", help="measure torch.compile of the plain expressions too")
    arguments = parser.parse_args()
    device, dtype = ("cuda", torch.bfloat16) if on_gpu else ("cpu", torch.float32)
    result = {
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
        "machine": {
            "gpu": torch.cuda.get_device_name() if on_gpu else None,
            "cpu": platform.processor() or platform.machine(),
            "cores": os.cpu_count(),
        },
        "versions": {"torch": torch.__version__, "python": platform.python_version()},
        "tokens": arguments.images * IMAGE,
        "dtype": str(dtype).removeprefix("torch."),
        "losses": {
            name: measure(sides, width, arguments, device, dtype) for name, (sides, width) in losses(arguments).items()
        },
    }
    RESULTS.mkdir(exist_ok=True)
    out = RESULTS / f"losses_{device}.json".replace("cuda", "gpu")
    out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result["losses"], indent=1))
    print(f"written to {out}")


Loss = Callable[[Any, Any], Any]


def losses(arguments: argparse.Namespace) -> dict[str, tuple[dict[str, Loss], int]]:
    """Both expressions of each loss by name, ours and the plain one, and the width of what they compare."""
    import torch
    import torch.nn.functional as F

    from nemo_pre.losses import gram_anchoring_loss, masked_prediction_loss, predictive_loss

    image_ids = torch.arange(arguments.images * IMAGE) // IMAGE

    def cosine(student: Any, teacher: Any) -> Any:
        return -F.cosine_similarity(student.float(), teacher.float(), dim=-1).sum()

    def cross_entropy(student: Any, teacher: Any) -> Any:
        return -((teacher.float() / 0.04).softmax(dim=-1) * (student.float() / 0.1).log_softmax(dim=-1)).sum()

    def clipped_gram(student: Any, teacher: Any) -> Any:
        student, teacher = (
            F.normalize(tokens.float(), dim=-1).view(arguments.images, IMAGE, -1) for tokens in (student, teacher)
        )
        return (student @ student.mT - teacher @ teacher.mT).clamp(min=0).square().sum()

    return {
        "PRe, cosine": ({"ours": lambda s, t: predictive_loss(s, t)[0], "plain": cosine}, HIDDEN),
        "LaVer, masked prediction": (
            {"ours": lambda s, t: masked_prediction_loss(s, t, 0.1, 0.04)[0], "plain": cross_entropy},
            LOGITS,
        ),
        "LaVer, clipped Gram": (
            {"ours": lambda s, t: gram_anchoring_loss(s, t, image_ids)[0], "plain": clipped_gram},
            LOGITS,
        ),
    }


def measure(
    sides: dict[str, Loss], width: int, arguments: argparse.Namespace, device: str, dtype: Any
) -> dict[str, Any]:
    import torch

    if arguments.compile:
        sides = {**sides, "plain, compiled": torch.compile(sides["plain"])}
    generator = torch.Generator().manual_seed(0)
    student, teacher = (
        torch.randn(arguments.images * IMAGE, width, generator=generator).to(device, dtype) for _ in range(2)
    )
    student.requires_grad_()
    milliseconds: dict[str, list[float]] = {side: [] for side in sides}
    for number in range(ROUNDS + WARM_UP):
        for side, loss in sides.items():
            student.grad = None
            start = now(device)
            loss(student, teacher).backward()
            if number >= WARM_UP:
                milliseconds[side].append(1000 * (now(device) - start))
    medians = {side: statistics.median(values) for side, values in milliseconds.items()}
    return {
        side: {
            "ms_median": round(medians[side], 3),
            "of_plain": round(medians[side] / medians["plain"], 3),
            "megabytes": round(memory(loss, student, teacher, device) / 1e6, 1),
        }
        for side, loss in sides.items()
    }


def now(device: str) -> float:
    import torch

    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def memory(loss: Loss, student: Any, teacher: Any, device: str) -> int:
    import torch

    student.grad = None
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        loss(student, teacher).backward()
        return torch.cuda.max_memory_allocated() - before
    kept: dict[int, int] = {}

    def keep(tensor: Any) -> Any:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss(student, teacher)
    return sum(kept.values())


if __name__ == "__main__":
    main()
