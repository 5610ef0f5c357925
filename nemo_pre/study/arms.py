"""The arms of the digits study, and the first stages that they start from."""

from __future__ import annotations

from dataclasses import dataclass

PLAIN, LAVER, BOTH = "experiment=digits_tiny", "experiment=digits-laver", "experiment=digits-pre-laver"
PRE = (PLAIN, "objective=pre")
VIRAL = "experiment=digits-viral"
MIXED, ROTARY_2D = "model.attention=mixed", "model.rope=2d"
NO_GRAM, PLAIN_GRAM = "objective.laver.gram_weight=0", "objective.laver.gram_clipped=false"
FROZEN = "optim.freeze_vision=true"
ALIGN = "optim.freeze_language=true"  # a first stage that trains the projector alone
SECOND_STAGE = (FROZEN, "optim.lr=5e-4")
LAVER_COST = 1.6  # of a step, in steps without

BASELINE = "baseline"


@dataclass(frozen=True)
class Arm:
    """One way to train.

    Attributes:
        overrides: of ``nemo-pre train``.
        first_stage: the name of the arm whose weights it starts from; None for a first stage itself.
        against: names of the arms it is compared with.
        main: trained with every seed, the others with the ablations' seeds.
        followed: measured along its stage, too, where a study measures only ends of the others.
    """

    name: str
    label: str
    overrides: tuple[str, ...]
    first_stage: str | None = None
    against: tuple[str, ...] = ()
    main: bool = False
    followed: bool = False

    @property
    def cost(self) -> float:
        return LAVER_COST if any("laver" in word for word in self.overrides) else 1.0


def first_stages() -> list[Arm]:
    """One for each way in which the decoder sees positions, which must not change between stages."""
    return [
        Arm("first_causal", "first stage, causal", (PLAIN,)),
        Arm("first_mixed_2d", "first stage, mixed attention + 2D-RoPE", (PLAIN, MIXED, ROTARY_2D)),
        Arm("first_mixed", "first stage, mixed attention", (PLAIN, MIXED)),
        Arm("first_2d", "first stage, 2D-RoPE", (PLAIN, ROTARY_2D)),
    ]


def digits_arms(num_layers: int) -> list[Arm]:
    """All arms for a decoder of ``num_layers`` layers, the baseline first."""
    middle = depths(num_layers)["middle"]

    def pre(name: str, label: str, *more: str, layer: int = middle, main: bool = False) -> Arm:
        overrides = (*PRE, f"objective.pre.layers=[{layer}]", *more)
        return Arm(name, label, overrides, "first_causal", (BASELINE,), main)

    def viral(name: str, label: str, *more: str) -> Arm:
        overrides = (VIRAL, f"objective.viral.layers=[{middle}]", *more)
        return Arm(name, label, overrides, "first_causal", (BASELINE,))

    def spatial(name: str, label: str, *overrides: str, main: bool = True) -> Arm:
        against = ("mixed_2d", BASELINE)
        return Arm(name, label, overrides, "first_mixed_2d", against, main)

    of_both = f"objective.pre.layers=[{middle}]"
    return [
        Arm(BASELINE, "baseline", (PLAIN,), "first_causal", (), main=True),
        pre("pre", "PRe, middle layer, lambda 0.5", main=True),
        Arm("mixed_2d", "mixed attention + 2D-RoPE", (PLAIN, MIXED, ROTARY_2D), "first_mixed_2d", (BASELINE,), True),
        spatial("mim", "MIM", LAVER, NO_GRAM),
        spatial("mim_ga", "MIM + Gram-anchoring", LAVER, PLAIN_GRAM),
        spatial("laver", "MIM + clipped Gram-anchoring (LaVer)", LAVER),
        spatial("pre_laver", "PRe + LaVer", BOTH, of_both),
        pre("pre_quarter", "PRe, a quarter deep", layer=depths(num_layers)["quarter"]),
        pre("pre_last", "PRe, last layer", layer=num_layers, main=True),
        pre("pre_weight_0.2", "PRe, lambda 0.2", "objective.pre.weight=0.2"),
        pre("pre_weight_1", "PRe, lambda 1", "objective.pre.weight=1"),
        pre("pre_weight_2", "PRe, lambda 2", "objective.pre.weight=2"),
        pre("pre_projector", "PRe, anchor before the projector", "objective.pre.anchor=pre_projector"),
        pre("pre_global", "PRe, global", "objective.pre.variant=global"),
        viral("viral", "VIRAL, the encoder's features"),
        viral("viral_similarity", "VIRAL, relational", "objective.viral.form=similarity"),
        Arm("mixed", "mixed attention", (PLAIN, MIXED), "first_mixed", (BASELINE,)),
        Arm("rope_2d", "2D-RoPE", (PLAIN, ROTARY_2D), "first_2d", (BASELINE,)),
    ]


def depths(num_layers: int) -> dict[str, int]:
    """The layers that numbers are told of; 0 is what enters the decoder."""
    return {"input": 0, "quarter": max(1, num_layers // 4), "middle": max(1, num_layers // 2), "last": num_layers}


def chosen(arms: list[Arm], names: str | None) -> list[Arm]:
    """The arms named, separated by commas, in the list's order; all without names.

    Raises:
        ValueError: a name that no arm has.
    """
    wanted = [arm.name for arm in arms] if names is None else [name.strip() for name in names.split(",")]
    for name in wanted:
        if name not in {arm.name for arm in arms}:
            raise ValueError(f"arms={names} names no arm {name!r}: choose of {', '.join(arm.name for arm in arms)}.")
    return [arm for arm in arms if arm.name in wanted]
