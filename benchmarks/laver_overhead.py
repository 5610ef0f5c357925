"""What LaVer costs in training: step time, FLOPs and peak memory, as the paper and as the released code compute it.

    python -m benchmarks.laver_overhead                                      # digits_tiny, on what the machine has
    python -m benchmarks.laver_overhead --model siglip2_qwen25_7b --layers 4 --precision bf16 --micro-batch-size 2

Beside a run with mixed attention and 2D-RoPE alone. The masked branch runs forward and backward on the visual tokens
and the teacher forward, so the bound is 1 + 1.33 f of the decoder's step, f being the visual share of its tokens; the
released code repeats the whole sequence, text included: 2.33.
"""

from __future__ import annotations

from typing import Any

from benchmarks.overhead import Settings, compare, parse_arguments, run_config

SPATIAL = ["model.attention=mixed", "model.rope=2d"]
MASKED = ["objective.laver.mask_schedule=constant"]  # from the first step on
SIDES = {
    "none": [*SPATIAL, "objective=none"],
    "laver": [*SPATIAL, "objective=laver/paper", *MASKED],
    "released_code": [*SPATIAL, "objective=laver/released_code", "objective.laver.mask_token_id=5", *MASKED],
}


def bounds(settings: Settings, result: dict[str, Any]) -> dict[str, Any]:
    from nemo_pre.config.derived import num_visual_tokens

    config = run_config(settings, "laver", "unused", 1)
    share = num_visual_tokens(config.model) / config.data.sequence_length
    bound = {"laver": 1 + 4 / 3 * share, "released_code": 1 + 4 / 3}
    return {
        "bound": {
            "visual_share": round(share, 4),
            "flops": {side: round(value, 4) for side, value in bound.items()},
            "counted_over_bound": {
                side: round(result["flops"]["ratio"][side] / value, 4) for side, value in bound.items()
            },
        }
    }


if __name__ == "__main__":
    arguments = parse_arguments("Step time, FLOPs and peak memory of LaVer.")
    sides = SIDES
    if arguments["model"] == "digits_tiny":
        # Beside a decoder of width 128 a head of 2048 would be most of the model: as wide, in proportion, as at 7B.
        sides = {
            name: [*sides[name], *(["objective.laver.head_hidden_width=73"] * (name != "none"))] for name in sides
        }
    chosen = Settings("laver_overhead", sides, **arguments)
    compare(chosen, lambda result: bounds(chosen, result))
