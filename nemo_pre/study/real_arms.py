"""The arms of the study on a language model that has read, in the order in which they are run."""

from __future__ import annotations

from nemo_pre.study.arms import BASELINE, MIXED, ROTARY_2D, Arm

NONE, PRE, LAVER, BOTH, VIRAL = (f"objective={name}" for name in ("none", "pre", "laver/paper", "pre_laver", "viral"))
RANDOM = "random"  # arms of a language model with random weights begin so
# The teacher looks back over as large a part of the stage as 0.999 does of the paper's 6,250 steps.
PAPER_HORIZON = 1000 / 6250


def real_first_stages() -> list[Arm]:
    """The projector alone, for each way in which the decoder sees positions and each language model."""
    return [
        Arm("first_causal", "first stage, causal", (NONE,)),
        Arm("first_mixed_2d", "first stage, mixed attention + 2D-RoPE", (NONE, MIXED, ROTARY_2D)),
        Arm("first_random", "first stage, random language model", (NONE,)),
    ]


def real_arms(num_layers: int, steps: int) -> list[Arm]:
    """All arms for a decoder of ``num_layers`` layers and a second stage of ``steps`` steps; main ones first."""
    middle = num_layers // 2
    of_pre, of_viral = f"objective.pre.layers=[{middle}]", f"objective.viral.layers=[{middle}]"
    momentum = f"objective.laver.momentum={teacher_momentum(steps)}"
    spatial = (MIXED, ROTARY_2D)

    def laver(name: str, label: str, *more: str, main: bool = False, objective: str = LAVER) -> Arm:
        overrides = (objective, *spatial, momentum, *more)
        return Arm(name, label, overrides, "first_mixed_2d", ("mixed_2d", BASELINE), main)

    def causal(name: str, label: str, *overrides: str, main: bool = False) -> Arm:
        return Arm(name, label, overrides, "first_causal", (BASELINE,), main)

    by_image = ("objective.laver.mim_reduction=image", "objective.laver.gram_reduction=image")
    of_encoder = "target=encoder", "target_path=null", "target_image_size=null"
    own_encoder = tuple(f"objective.viral.{option}" for option in of_encoder)
    return [
        Arm(BASELINE, "baseline", (NONE,), "first_causal", (), main=True, followed=True),
        causal("pre", "PRe, middle layer, lambda 0.5", PRE, of_pre, main=True),
        Arm("mixed_2d", "mixed attention + 2D-RoPE", (NONE, *spatial), "first_mixed_2d", (BASELINE,), main=True),
        laver("laver", "MIM + clipped Gram-anchoring (LaVer)", main=True),
        Arm("random", "baseline, random language model", (NONE,), "first_random", (BASELINE,), main=True),
        causal("pre_last", "PRe, last layer", PRE, f"objective.pre.layers=[{num_layers}]"),
        laver("mim", "MIM", "objective.laver.gram_weight=0"),
        laver("mim_ga", "MIM + Gram-anchoring", "objective.laver.gram_clipped=false"),
        laver("pre_laver", "PRe + LaVer", of_pre, objective=BOTH),
        causal("viral", "VIRAL, the encoder's features", VIRAL, of_viral, *own_encoder),
        laver("laver_sums", "LaVer, sums over an image", *by_image),
    ]


def teacher_momentum(steps: int) -> float:
    """The momentum whose average looks back over ``PAPER_HORIZON`` of ``steps``, at least over two of them."""
    return round(1 - 1 / max(2.0, PAPER_HORIZON * steps), 4)


def run_order(arm: Arm, seed: int, position: int) -> tuple[float, int, int]:
    """What sorts runs so that every beginning of the list answers something: main arms of two seeds, then one seed of
    the others, then the rest."""
    return (seed if arm.main else seed + 1.5, seed, position)


def real_depths(num_layers: int) -> dict[str, int]:
    """The layers that are measured; 0 is what enters the decoder."""
    return {
        "input": 0,
        "quarter": max(1, num_layers // 4),
        "middle": max(1, num_layers // 2),
        "three_quarters": max(1, 3 * num_layers // 4),
        "last": num_layers,
    }
