"""Validation by answering: exact match of generated answers per type of question, and the loss of the true ones."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from nemo_pre.callbacks.metrics import record_metrics
from nemo_pre.callbacks.progress import progress_of
from nemo_pre.config.run import RunConfig
from nemo_pre.data.collate import joined_images
from nemo_pre.data.conversation import end_of_answer
from nemo_pre.data.dataset import ConversationDataset
from nemo_pre.data.evaluation import ValidationSample, load_validation_samples
from nemo_pre.data.manifest import read_manifest
from nemo_pre.data.preprocessing import build_preprocessing
from nemo_pre.data.scoring import Score, exact_match
from nemo_pre.generation import TokenSequence, answer_loss, generate

log = logging.getLogger(__name__)

SPARE_TOKENS = 2  # beyond the longest true answer: its end, and one more to see that an answer is too long


@dataclass(frozen=True)
class Result:
    """What one validation found over all data-parallel ranks; seconds are wall time of the slowest rank.

    Attributes:
        scores: by question type; ``all`` is all of them.
        loss_sum, loss_tokens: cross-entropy (nats) of the true answers, every turn of each conversation.
        new_tokens: generated.
    """

    scores: dict[str, Score]
    loss_sum: float
    loss_tokens: int
    new_tokens: int
    seconds: float

    @property
    def loss(self) -> float | None:
        """Mean over the answers' tokens; None where there are none."""
        return self.loss_sum / self.loss_tokens if self.loss_tokens else None

    def metrics(self) -> dict[str, float]:
        named: dict[str, float] = {} if self.loss is None else {"val/lm_loss": self.loss}
        for kind, score in self.scores.items():
            suffix = "" if kind == "all" else f"/{kind}"
            named[f"val/exact_match{suffix}"] = score.accuracy
            named[f"val/answers{suffix}"] = float(score.total)
        return named

    def __str__(self) -> str:
        matched = ", ".join(f"{kind} {score.accuracy:.1%} of {score.total}" for kind, score in self.scores.items())
        answers = self.scores["all"].total if "all" in self.scores else 0
        loss = "no answer has a loss" if self.loss is None else f"loss {self.loss:.4g}"
        return (
            f"exact match: {matched} | {loss} | {answers} answers, {self.new_tokens} tokens in "
            f"{self.seconds:.1f} s, {answers / self.seconds:.3g} answers/s"
        )


def add_up(results: list[Result]) -> Result:
    """One result from those of the data-parallel ranks."""
    kinds = sorted({kind for result in results for kind in result.scores}, key=lambda kind: (kind != "all", kind))
    found = {kind: [result.scores[kind] for result in results if kind in result.scores] for kind in kinds}
    return Result(
        {kind: Score(sum(s.correct for s in scores), sum(s.total for s in scores)) for kind, scores in found.items()},
        sum(result.loss_sum for result in results),
        sum(result.loss_tokens for result in results),
        sum(result.new_tokens for result in results),
        max(result.seconds for result in results),
    )


class ExactMatchCallback(Callback):
    """Answers the first ``trainer.val_samples`` questions of the val split every ``trainer.val_every`` steps and at
    the end, the samples shared out over data-parallel ranks. Every rank takes part.

    Logs ``val/exact_match`` and ``val/exact_match/TYPE``, the counts as ``val/answers...``, and ``val/lm_loss``.

    Raises:
        ValueError: when fitting starts, if there is no val split or a sample cannot be read.
    """

    def __init__(self, config: RunConfig) -> None:
        self.config = config
        self._evaluated_at = -1

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        from megatron.core import parallel_state as ps

        how = build_preprocessing(self.config)
        self.tokenizer = how.tokenizer
        rank, ranks = ps.get_data_parallel_rank(), ps.get_data_parallel_world_size()
        samples = load_validation_samples(self.config, self.config.trainer.val_samples, self.tokenizer)
        self.longest_answer = max((self._num_tokens(sample.answer) for sample in samples), default=0)
        self.samples: list[ValidationSample] = samples[rank::ranks]
        dataset = ConversationDataset(read_manifest(self.config.data.path), "val", how)
        self.native = how.native is not None
        self.conversations = [self._labelled(dataset[number]) for number in range(rank, len(samples), ranks)]

    def _num_tokens(self, answer: str) -> int:
        return len(self.tokenizer(" " + answer, add_special_tokens=False)["input_ids"])

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        every = self.config.trainer.val_every
        if every and trainer.global_step % every == 0:
            self._report(trainer)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        if self._evaluated_at != trainer.global_step:
            self._report(trainer)

    def _report(self, trainer: Any) -> None:
        self._evaluated_at = trainer.global_step
        result = self.evaluate(trainer)
        record_metrics(trainer, result.metrics())
        line = f"step {trainer.global_step}, {result}"
        if (progress := progress_of(trainer)) is not None:
            progress.say(line)
        elif trainer.is_global_zero:
            log.info(line)

    def evaluate(self, trainer: Any) -> Result:
        """Answer the validation samples and score the answers; every rank returns the same result."""
        from megatron.core import parallel_state as ps

        from nemo_pre.neva.model import model_chunks

        chunks = model_chunks(trainer)
        rows = self.config.trainer.micro_batch_size
        progress = progress_of(trainer)

        def on_progress(finished: int, prompts: int) -> None:
            if progress is not None:
                progress.status(f"step {trainer.global_step}, validation: {finished}/{prompts} answers")

        started = time.perf_counter()
        answers = generate(
            chunks,
            [self._sequence(sample.prompt, sample.images) for sample in self.samples],
            max_new_tokens=self.longest_answer + SPARE_TOKENS,
            stop_token=end_of_answer(self.tokenizer, self.config.data.chat_template),
            vocab_size=len(self.tokenizer),
            micro_batch_size=rows,
            on_progress=on_progress,
        )
        seconds = time.perf_counter() - started
        loss_sum, loss_tokens = answer_loss(chunks, self.conversations, rows)
        scores = exact_match(
            [self.tokenizer.decode(answer, skip_special_tokens=True) for answer in answers],
            [sample.answer for sample in self.samples],
            [sample.question_type for sample in self.samples],
        )
        own = Result(scores, loss_sum, loss_tokens, sum(map(len, answers)), seconds)
        ranks: list[Any] = [own] * ps.get_data_parallel_world_size()
        if len(ranks) > 1:
            dist.all_gather_object(ranks, own, group=ps.get_data_parallel_group_gloo())
        return add_up(ranks)

    def _labelled(self, item: Any) -> TokenSequence:
        tokens, labels = (torch.tensor(row, dtype=torch.int64) for row in (item.tokens, item.labels))
        return self._sequence(tokens, item.images, labels)

    def _sequence(self, tokens: Tensor, images: list[Tensor], labels: Tensor | None = None) -> TokenSequence:
        media = joined_images(images, self.native)
        return TokenSequence(tokens, media["media"], labels, media.get("media_grids"))
