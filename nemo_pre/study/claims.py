"""What both papers say, each as a number that the study has, and whether it is seen."""

from __future__ import annotations

from dataclasses import dataclass

from nemo_pre.report.intervals import Estimate
from nemo_pre.study.real_summary import Summary, between, over_seeds

SEEN, NOT_SEEN, OPPOSITE, UNDECIDED = "seen", "not seen", "the opposite is seen", "not decidable here"
PRE, LAVER = "PRe", "LaVer"


@dataclass(frozen=True)
class Claim:
    """A published statement, as a number above or below 0.

    Attributes:
        paper: whose.
        said: in a few words.
        measured: what stands for it, in words.
        direction: 1 where the number is claimed to be above 0, -1 below.
        arm, metric: of whose mean it is, or of whose difference to ``other`` (of ``other_metric``).
        figure: that shows it.
    """

    paper: str
    said: str
    measured: str
    direction: int
    arm: str
    metric: str
    other: str | None = None
    other_metric: str | None = None
    figure: str = "layers"

    def estimate(self, summary: Summary) -> Estimate | None:
        if self.other is None:
            return over_seeds(summary, self.arm, self.metric)
        return between(summary, self.arm, self.other, self.metric, self.other_metric)

    def verdict(self, summary: Summary) -> str:
        """``SEEN`` where the 95% interval lies on the claimed side of 0; without an interval nothing is decided."""
        found = self.estimate(summary)
        if found is None or found.low is None or found.high is None:
            return UNDECIDED
        if found.low <= 0 <= found.high:
            return NOT_SEEN
        return SEEN if found.value * self.direction > 0 else OPPOSITE


BASE = "baseline"
CLAIMS = (
    Claim(
        PRE,
        "inner layers hold less of what a picture shows than what enters the language model",
        "concept's probe, held-out style: middle less input, baseline",
        -1,
        BASE,
        "concept change@middle",
    ),
    Claim(
        PRE,
        "it is training on language that takes it away",
        "that dip at the end of stage 2, less the dip before stage 1",
        -1,
        BASE,
        "concept change@middle",
        BASE,
        "concept change@middle start",
        "trade_off",
    ),
    Claim(
        PRE,
        "and it goes on while answers get better",
        "that dip at the end of stage 2, less the dip at a quarter of it",
        -1,
        BASE,
        "concept change@middle",
        BASE,
        "concept change@middle 1/4",
        "trade_off",
    ),
    Claim(
        PRE,
        "a language model that has read does this",
        "that dip, less the dip of a language model with random weights",
        -1,
        BASE,
        "concept change@middle",
        "random",
    ),
    Claim(
        PRE,
        "patches of different things become alike",
        "coupling: middle less input, baseline",
        1,
        BASE,
        "coupling change@middle",
    ),
    Claim(
        PRE,
        "contrast between things falls",
        "cohesion - coupling: middle less input, baseline",
        -1,
        BASE,
        "contrast_difference change@middle",
    ),
    Claim(
        PRE,
        "inner layers unfold: their effective dimension is larger",
        "effective dimension: middle less input, baseline",
        1,
        BASE,
        "effective_dimension change@middle",
    ),
    Claim(
        PRE,
        "and their features are less correlated",
        "redundancy: middle less input, baseline",
        -1,
        BASE,
        "redundancy change@middle",
    ),
    Claim(
        PRE,
        "PRe lifts the middle",
        "concept's probe in the middle: PRe less baseline",
        1,
        "pre",
        "concept@middle",
        BASE,
    ),
    Claim(
        PRE,
        "PRe keeps things apart there",
        "cohesion - coupling in the middle: PRe less baseline",
        1,
        "pre",
        "contrast_difference@middle",
        BASE,
    ),
    Claim(
        PRE,
        "PRe improves answers",
        "exact match: PRe less baseline",
        1,
        "pre",
        "exact_match",
        BASE,
        None,
        "answers",
    ),
    Claim(
        PRE,
        "and better at the middle than at the last layer",
        "exact match: PRe at the middle less PRe at the last layer",
        1,
        "pre",
        "exact_match",
        "pre_last",
        None,
        "answers",
    ),
    Claim(
        LAVER,
        "visual tokens become alike with depth",
        "cosine of two visual tokens: last less input, baseline",
        1,
        BASE,
        "pairwise_cosine change@last",
    ),
    Claim(
        LAVER,
        "mixed attention with 2D-RoPE helps",
        "exact match: mixed attention + 2D-RoPE less baseline",
        1,
        "mixed_2d",
        "exact_match",
        BASE,
        None,
        "answers",
    ),
    Claim(
        LAVER,
        "MIM alone costs answers",
        "exact match: MIM less the same without",
        -1,
        "mim",
        "exact_match",
        "mixed_2d",
        None,
        "answers",
    ),
    Claim(
        LAVER,
        "Gram-anchoring brings them back",
        "exact match: MIM + Gram-anchoring less MIM",
        1,
        "mim_ga",
        "exact_match",
        "mim",
        None,
        "answers",
    ),
    Claim(
        LAVER,
        "clipped Gram-anchoring is better still",
        "exact match: LaVer less MIM + Gram-anchoring",
        1,
        "laver",
        "exact_match",
        "mim_ga",
        None,
        "answers",
    ),
    Claim(
        LAVER,
        "LaVer improves answers",
        "exact match: LaVer less the same without its losses",
        1,
        "laver",
        "exact_match",
        "mixed_2d",
        None,
        "answers",
    ),
    Claim(
        LAVER,
        "LaVer keeps visual tokens apart",
        "cosine of two visual tokens in the last layer: LaVer less the same without its losses",
        -1,
        "laver",
        "pairwise_cosine@last",
        "mixed_2d",
    ),
)
