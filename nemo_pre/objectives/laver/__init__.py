"""LaVer, Latent Visual Reconstruction (arXiv 2512.06281): masked visual tokens are recovered in the language model's
latent space against a moving-average teacher that saw them all (L_MIM), and the student's visual tokens may not become
more alike than the teacher's (L_CGA, clipped Gram-anchoring)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from nemo_pre.objectives.metrics import TermMetric
from nemo_pre.objectives.objective import FROM_NEXT_STEP, TRAINED, Objective
from nemo_pre.objectives.schedules import ScheduleConfig
from nemo_pre.options import applied, choice, fraction, number

NAME = "laver"


@dataclass
class LaVerConfig:
    """Options of LaVer (arXiv 2512.06281); the defaults are the preset ``objective=laver/paper``."""

    enabled: bool = False  # whether the run has it
    sequence: str = choice(
        "images", {"images": "packed, each by itself", "whole": "each sample again, with its text"}
    )  # what is masked
    mim_weight: float = number(1.0, least=0)
    mim_schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    gram_weight: float = number(1.0, least=0)
    gram_schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    mask_ratio: float = fraction(0.05)  # at the end of the schedule
    mask_schedule: str = choice(
        "cosine", {"cosine": "from 0", "delayed": "0 for an eighth of the run", "constant": ""}
    )
    mask_sampling: str = choice(
        "bernoulli", {"bernoulli": "each token by itself", "count": "floor(ratio x tokens) of each image"}
    )
    mask_token: str = choice(
        "learned", {"learned": "a vector", "embedding": "the word mask_token_id"}
    )  # in a masked place
    mask_token_id: int | None = number(None, least=0)  # the word of mask_token=embedding
    student_temperature: float = number(0.1, above=0)
    teacher_temperature: float = number(0.04, above=0)
    centring: bool = False  # subtract a running mean from the teacher's logits
    center_momentum: float = fraction(0.9)
    mim_reduction: str = choice(
        "global",
        {
            "global": "mean over masked tokens",
            "micro_batch": "mean of micro-batches' means",
            "image": "sum over an image's masked tokens, mean over images",
        },
    )
    gram_clipped: bool = True  # L_CGA: only what is more alike for the student counts; false: L_GA
    gram_reduction: str = choice(
        "global",
        {"global": "mean over matrix entries", "image": "an image's Frobenius norm squared, mean over images"},
    )
    gram_scope: str = choice("image", {"image": "", "micro_batch": "all visual tokens of a micro-batch together"})
    gram_positions: str = choice("all", ("all", "masked"))
    head_hidden_width: int = number(2048, least=1)
    momentum: float = fraction(0.999)  # of the teacher's average; where a schedule starts
    momentum_schedule: str = choice("constant", {"constant": "", "cosine": "to 1"})
    update_every: int = number(1, least=1)  # optimizer steps between two updates of the teacher
    update_fraction: float | None = fraction(None)  # the same as a fraction of max_steps; goes before update_every
    teacher_memory: str = choice(
        "resident", {"resident": "a copy in the weights' dtype", "gathered": "layer by layer, before use"}
    )


class LaVer(Objective):
    name = NAME
    title = "LaVer"
    source = "LaVer, Latent Visual Reconstruction ([arXiv 2512.06281](https://arxiv.org/abs/2512.06281))"
    Options = LaVerConfig
    term = "nemo_pre.objectives.laver.term:LaVerTerm"
    cost = "nemo_pre.objectives.laver.cost:LaVerCost"
    metrics = (
        TermMetric("laver/mim", "LaVer: masked prediction (nats)", progress="mim", zero=True),
        TermMetric("laver/gram", "LaVer: Gram-anchoring", progress="gram", zero=True),
        TermMetric(
            "laver/similarity",
            "LaVer: mean cosine of visual tokens, head's output",
            progress="similarity",
            at_most=1,
            said_by_layer="similarity/",
        ),
        TermMetric("laver/teacher_entropy", "LaVer: entropy of the teacher (nats)", compared=False, zero=True),
    )
    trained = ("laver_head.", "laver_mask_token")
    averaged = ("laver_teacher.",)
    # Of the teacher the head stands for the rest, which has the names and shapes of the language model's layers.
    compared_on_resume = (*trained, "laver_teacher.head.", "laver_teacher.center")
    on_resume = {
        **dict.fromkeys(
            (
                *("sequence", "mim_weight", "mim_schedule", "gram_weight", "gram_schedule", "mask_sampling"),
                *("mask_token_id", "student_temperature", "teacher_temperature", "center_momentum", "mim_reduction"),
                *("centring", "gram_clipped", "gram_reduction", "gram_scope", "gram_positions", "update_every"),
            ),
            FROM_NEXT_STEP,
        ),
        **dict.fromkeys(
            ("mask_ratio", "mask_schedule", "momentum", "momentum_schedule", "update_fraction"),
            applied("from the next step on, as if the run had begun with it"),
        ),
        **dict.fromkeys(("mask_token", "head_hidden_width"), TRAINED),
        "teacher_memory": applied("where and how the run runs; its numbers stay"),
    }
    model_words = ("model.attention=mixed", "model.rope=2d")

    def problems(self) -> Iterator[str]:
        model, laver = self.config.model, self.options
        if model.attention != "mixed":
            yield (
                "LaVer's masked images must see themselves both ways and nothing else: set model.attention=mixed "
                "(and model.rope=2d, as the paper has it)."
            )
        if laver.mask_token == "embedding" and laver.mask_token_id is None:
            yield (
                f"{self.option('mask_token')}=embedding needs {self.option('mask_token_id')}, the tokenizer's "
                f"image-pad token (Qwen2.5: 151655)."
            )
        if laver.mask_token_id is not None and not 0 <= laver.mask_token_id < model.language.vocab_size:
            yield (
                f"{self.option('mask_token_id')}={laver.mask_token_id} is no token of a vocabulary of "
                f"{model.language.vocab_size}: set it to the tokenizer's image-pad token."
            )

    def ignored(self) -> Iterator[str]:
        laver = self.options
        yield from super().ignored()
        if laver.mask_token == "learned" and laver.mask_token_id is not None:
            yield f"{self.option('mask_token_id')} has no effect with {self.option('mask_token')}=learned."
        if not laver.centring and laver.center_momentum != LaVerConfig.center_momentum:
            yield f"{self.option('center_momentum')} has no effect with {self.option('centring')}=false."
        if laver.update_fraction is not None and laver.update_every != LaVerConfig.update_every:
            yield f"{self.option('update_every')} has no effect where update_fraction is set."
        if laver.mim_weight == 0 and laver.gram_weight == 0:
            yield "objective.laver costs a second sequence and a teacher and has no effect with both weights 0."
        if self.config.optim.freeze_language:
            yield "objective.laver trains the language model, which optim.freeze_language=true keeps as it is."

    def summary(self) -> str:
        laver = self.options
        return (
            f"{self.title}, weights {laver.mim_weight:g} (masked prediction) and {laver.gram_weight:g} "
            f"({'clipped ' if laver.gram_clipped else ''}Gram)"
        )

    @classmethod
    def described(cls, title: str, options: Any) -> str:
        return f"{title}, weights {options.mim_weight:g} and {options.gram_weight:g}"
