"""The one place where loss terms are weighted and divided by the counts of the global batch.

Megatron accumulates, over micro-batches and data-parallel and context-parallel ranks, the gradient of whatever
each pipeline stage backpropagates, and then divides the accumulated sum once:

- with ``calculate_per_token_loss`` by the number of loss tokens of the global batch,
- otherwise by data-parallel x context-parallel ranks (the gradient all-reduce averages).

The language-model loss follows that convention by itself. An auxiliary term is injected on the stage that
computes it, so what it injects must carry ``weight / (its own global count)`` times that later divisor.
Every factor in it is known before the step's first backward pass, because :class:`StepPlan` counts first.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

Number = TypeVar("Number", bound=Any)  # float or tensor


LOSS_TOKENS, VISUAL_TOKENS, IMAGES = "loss_tokens", "visual_tokens", "images"  # counts that every plan has


@dataclass(frozen=True)
class StepPlan:
    """What is known of an optimizer step before its first micro-batch runs.

    Attributes:
        num_microbatches: micro-batches on this rank.
        sequence_length: combined text and image tokens every micro-batch of this rank is padded to.
        counts: what losses are divided by, summed over the global batch (all data-parallel ranks, all micro-batches)
            and made after truncation: loss tokens, visual tokens, images with at least one token left, and what terms
            count (:meth:`nemo_pre.terms.term.Term.counts`).
        weights: of the loss terms (``lm`` is the language model's) at this step, schedules applied.
    """

    num_microbatches: int
    sequence_length: int
    counts: Mapping[str, int] = field(default_factory=dict)
    weights: Mapping[str, float] = field(default_factory=dict)

    @property
    def loss_tokens(self) -> int:
        """Loss tokens of the global batch."""
        return self.counts[LOSS_TOKENS]

    @property
    def visual_tokens(self) -> int:
        """Visual tokens of the global batch."""
        return self.counts[VISUAL_TOKENS]

    @property
    def images(self) -> int:
        """Images of the global batch that have a visual token."""
        return self.counts[IMAGES]


def gradient_divisor(plan: StepPlan, per_token_loss: bool, data_context_ranks: int) -> float:
    """What Megatron divides the accumulated gradient by after the step's last backward pass."""
    if per_token_loss:
        return float(max(plan.loss_tokens, 1))  # finalize_model_grads leaves the sum alone when there are none
    return float(data_context_ranks)


def term_scale(plan: StepPlan, term: str, global_count: int, model_config: Any, parts: int = 1) -> float:
    """Factor for the ``loss_sum`` of one of the step's terms: :func:`auxiliary_loss_scale` on this run's ranks.

    Args:
        term: its name in ``plan.weights``.
        global_count: what the term is averaged over, summed over the global batch (see :class:`StepPlan`).
        model_config: Megatron's configuration of the whole model.
        parts: layers that share the term's weight.
    """
    from megatron.core import parallel_state as ps

    ranks = ps.get_data_parallel_world_size(with_context_parallel=True)
    divisor = gradient_divisor(plan, model_config.calculate_per_token_loss, ranks)
    return auxiliary_loss_scale(plan.weights[term] / parts, global_count, divisor, model_config.grad_scale_func)


def auxiliary_loss_scale(
    weight: float,
    global_count: int,
    divisor: float,
    grad_scale_func: Callable[[float], float] | None,
) -> float:
    """Factor for an auxiliary ``loss_sum`` so that, after all of Megatron's reductions, the gradient is that of
    ``weight * loss_sum_over_the_global_batch / global_count``.

    Args:
        weight: the term's weight at this step, schedule applied.
        global_count: what the term is averaged over, summed over the global batch; 0 gives scale 0.
        divisor: :func:`gradient_divisor`.
        grad_scale_func: Megatron's loss scaling for fp16 (``config.grad_scale_func``), or None.
    """
    if global_count == 0:
        return 0.0
    scale = weight * divisor / global_count
    return scale if grad_scale_func is None else float(grad_scale_func(scale))


def global_mean(loss_sum: Number, global_count: int) -> Number:
    """The value that is reported: a term's sum over the global batch by its count there; 0 where there is nothing."""
    return loss_sum / max(global_count, 1)
