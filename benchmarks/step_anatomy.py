"""What a step is made of: the decoder on text alone, NeVA, and NeVA with PRe, with LaVer and with both; or in one
precision after another.

    python -m benchmarks.step_anatomy parts --model llava15_7b --layers 4 --precision bf16 --micro-batch-size 2
    python -m benchmarks.step_anatomy spatial --model llava15_7b --layers 4 --precision bf16 --micro-batch-size 2
    python -m benchmarks.step_anatomy precision --model llava15_7b --layers 4 --micro-batch-size 2

Every side is a run of the product (see :mod:`benchmarks.overhead`); all are in memory at once, so depth is cut to what
fits. Of ``parts`` the first is NeVA on samples without an image, as long as the others: what Megatron gives a text
model of these layers. ``spatial`` has the sides with LaVer, which have mixed attention and 2D-RoPE, and so has the
plain run they are read by. A cut decoder leaves the output layer and the vision tower a larger share than at full
depth: FP8's gain and LaVer's ratio come out smaller, PRe's larger.
"""

from __future__ import annotations

import sys
from typing import Any

from benchmarks.overhead import Settings, compare, parse_arguments
from nemo_pre.planner.devices import DEVICES

SPATIAL = ["model.attention=mixed", "model.rope=2d"]
MASKED = ["objective.laver.mask_schedule=constant"]  # from the first step on
PARTS = {
    "text": ["objective=none"],
    "neva": ["objective=none"],
    "pre": ["objective=pre"],
    "neva_spatial": [*SPATIAL, "objective=none"],
    "laver": [*SPATIAL, "objective=laver/paper", *MASKED],
    "both": [*SPATIAL, "objective=pre_laver", *MASKED],
}
# At full depth two of 32 layers stay bf16; in a decoder cut to four they would be half of it.
ALL_LAYERS = ["precision.bf16_layers=0"]
PRECISIONS = {
    name: ["objective=none", f"precision={name}", *(ALL_LAYERS if name in ("fp8_tensorwise", "fp8_blockwise") else [])]
    for name in ("bf16", "fp8_delayed", "fp8_tensorwise", "fp8_blockwise")
}
ON_CPU = {name: ["objective=none", f"precision={name}"] for name in ("bf16", "fp32")}


STAGES = {"parts": ("text", "neva", "pre"), "spatial": ("neva_spatial", "laver", "both")}


def part_sides(model: str) -> dict[str, list[str]]:
    """The overrides of each run of ``parts`` and ``spatial``."""
    if model != "digits_tiny":
        return PARTS
    # Beside a decoder of width 128 a head of 2048 would be most of the model: as wide, in proportion, as at 7B.
    narrow = ["objective.laver.head_hidden_width=73"]
    return {name: [*words, *(narrow if name in ("laver", "both") else [])] for name, words in PARTS.items()}


def throughput(result: dict[str, Any]) -> dict[str, Any]:
    """Samples (with an image each, but for ``text``) and tokens a second, and FLOP/s as counted: with the vision
    tower's matrices, without its attention, and plain attention by all pairs of tokens, also those that a causal
    kernel skips. On a GPU in the planner's table also as a share of its bf16 peak, in FP8 too."""
    settings = result["settings"]
    samples = settings["micro_batch_size"] * settings["num_microbatches"]
    gpu = (result["machine"]["gpu"] or "").lower().removeprefix("nvidia ")
    device = next((device for name, device in DEVICES.items() if gpu.startswith(name)), None)
    rates = {}
    for side in settings["sides"]:
        seconds = result["step_time"][f"{side}_median_ms"] / 1000
        flops = result["flops"][side] / seconds
        rates[side] = {
            "samples_per_second": round(samples / seconds, 3),
            "tokens_per_second": round(samples * result["tokens_per_sample"] / seconds, 1),
            "tflops_per_second": round(flops / 1e12, 4),
            **({"model_flops_utilisation": round(flops / device.bf16, 4)} if device else {}),
        }
    return {"throughput": rates}


def main() -> None:
    what = sys.argv.pop(1) if len(sys.argv) > 1 else ""
    if what not in (*STAGES, "precision"):
        sys.exit(__doc__)
    arguments = parse_arguments("Step time by part of the model or by precision.")
    if what == "precision":
        import torch

        sides = PRECISIONS if torch.cuda.is_available() else ON_CPU
        compare(Settings("step_precision", sides, **arguments), throughput)
        return
    sides = {name: words for name, words in part_sides(arguments["model"]).items() if name in STAGES[what]}
    text_only = ("text",) if what == "parts" else ()
    compare(Settings(f"step_{what}", sides, **arguments, text_only=text_only), throughput)


if __name__ == "__main__":
    main()
