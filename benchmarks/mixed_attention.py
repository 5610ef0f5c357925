"""Mixed attention at a 7B decoder's head shapes: block-sparse, run by run, with a dense mask; and causal Flash.

    python -m benchmarks.mixed_attention          # on a GPU: 2k, 4k and 8k tokens; on a CPU 1k

All kernels take turns on the same tensors. Beside milliseconds stands the time per unmasked pair of tokens relative to
causal attention's, which is what a kernel can be held to: a bidirectional image has more pairs than a causal one.
FlexAttention has no backward pass on a CPU and is then left out, and said so.
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
HEADS, GROUPS, WIDTH = 28, 4, 128  # Qwen2.5-7B
IMAGE = 576
ROUNDS, WARM_UP = 10, 3


def main() -> None:
    import torch

    from nemo_pre.launch.environment import prepare_environment

    prepare_environment()
    on_gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description="Mixed attention against causal attention.")
    parser.add_argument("--lengths", type=int, nargs="+", default=[2048, 4096, 8192] if on_gpu else [1024])
    lengths = parser.parse_args().lengths
    result = {
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
        "machine": {
            "gpu": torch.cuda.get_device_name() if on_gpu else None,
            "cpu": platform.processor() or platform.machine(),
            "cores": os.cpu_count(),
        },
        "versions": {"torch": torch.__version__},
        "shape": {"heads": HEADS, "groups": GROUPS, "width": WIDTH, "image": IMAGE},
        "flex": "measured" if on_gpu else "not measured: no GPU",
        "lengths": {length: measure(length, on_gpu) for length in lengths},
    }
    RESULTS.mkdir(exist_ok=True)
    out = RESULTS / f"mixed_attention_{'gpu' if on_gpu else 'cpu'}.json"
    out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result["lengths"], indent=1))
    print(f"written to {out}")


def measure(length: int, on_gpu: bool) -> dict[str, Any]:
    """Medians in milliseconds, forward and backward, of every kernel on one sample of images and text."""
    import torch
    import torch.nn.functional as F

    from nemo_pre.neva.mixed_attention import _attend_flex, attend_dense, attend_split
    from nemo_pre.parallel.token_streams import may_attend

    device, dtype = ("cuda", torch.bfloat16) if on_gpu else ("cpu", torch.float32)
    generator = torch.Generator().manual_seed(0)
    query, key, value = (
        torch.randn(1, heads, length, WIDTH, generator=generator).to(device, dtype).requires_grad_()
        for heads in (HEADS, GROUPS, GROUPS)
    )
    structure = structure_of(length).to(device)
    scale = WIDTH**-0.5

    def causal() -> Any:
        if on_gpu:  # which shares keys and values without copies, as FlexAttention does
            return F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale, enable_gqa=True)
        repeated = (tensor.repeat_interleave(HEADS // GROUPS, dim=1) for tensor in (key, value))
        return F.scaled_dot_product_attention(query, *repeated, is_causal=True, scale=scale)

    kernels: dict[str, Callable[[], Any]] = {
        "causal": causal,
        "dense": lambda: attend_dense(query, key, value, structure, 0, scale),
        "split": lambda: attend_split(query, key, value, structure, 0, scale),
    }
    if on_gpu:
        kernels["flex"] = lambda: _attend_flex(query, key, value, structure, 0, scale)
    times: dict[str, dict[str, list[float]]] = {name: {"forward": [], "backward": []} for name in kernels}
    gradient = torch.randn_like(causal())
    calls = 20 if on_gpu else 1  # one of a tenth of a millisecond would be the host's time
    for number in range(ROUNDS + WARM_UP):
        for name, attend in kernels.items():
            wait(on_gpu)
            start = time.perf_counter()
            for _ in range(calls):
                output = attend()
            wait(on_gpu)
            middle = time.perf_counter()
            for _ in range(calls):
                output.backward(gradient, retain_graph=True)
            wait(on_gpu)
            if number >= WARM_UP:
                times[name]["forward"].append(1000 * (middle - start) / calls)
                times[name]["backward"].append(1000 * (time.perf_counter() - middle) / calls)
            del output
    mixed_pairs, causal_pairs = int(may_attend(structure, structure).sum()), length * (length + 1) // 2
    found: dict[str, Any] = {"unmasked_pairs": {"causal": causal_pairs, "mixed": mixed_pairs}}
    for name, passes in times.items():
        pairs = causal_pairs if name == "causal" else mixed_pairs
        found[name] = {}
        for which, values in passes.items():
            found[name][f"{which}_ms"] = round(statistics.median(values), 3)
            ratios = [
                (reference / causal_pairs) / (own / pairs)
                for own, reference in zip(values, times["causal"][which], strict=True)
            ]
            found[name][f"{which}_speed_per_pair_of_causal"] = round(statistics.median(ratios), 3)
    return found


def structure_of(length: int) -> Any:
    """A sample of images with text after each, as the decoder is told of it."""
    import torch

    from nemo_pre.parallel.sequence_layout import sequence_layout, square_tiles
    from nemo_pre.parallel.token_streams import StreamShape, decoder_streams

    images = max(1, length // (2 * IMAGE))
    text = (length - images * IMAGE) // images
    tokens = torch.tensor([([-200] + [5] * text) * images])
    layout = sequence_layout(tokens, square_tiles([1] * images, IMAGE), -200, length)
    return decoder_streams(layout, None, StreamShape(True, "2d")).structure_BK3


def wait(on_gpu: bool) -> None:
    import torch

    if on_gpu:
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
