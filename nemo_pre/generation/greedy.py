"""Greedy generation.

With a key-value cache a prompt runs once and then one token a step. Sequence and context parallelism cut sequences
over ranks; there every new token runs the whole prefix again, images included, which suits short answers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import Tensor

from nemo_pre.generation.forward import (
    PADDING,
    Batch,
    TokenSequence,
    combined_length,
    evaluating,
    last_logits,
    make_batches,
    only_logits,
    run,
    run_whole,
)
from nemo_pre.neva.key_value_cache import CachedBatch, KeyValueCache, cached_attention, cached_batch, can_cache
from nemo_pre.neva.model import MCoreVisualNevaModel


def generate(
    chunks: list[MCoreVisualNevaModel],
    prompts: Sequence[TokenSequence],
    max_new_tokens: int,
    stop_token: int,
    vocab_size: int,
    micro_batch_size: int = 8,
    cache: bool = True,
    on_progress: Callable[[int, int], None] | None = None,
    on_token: Callable[[int, int], None] | None = None,
) -> list[list[int]]:
    """The most likely next token, again and again, until ``stop_token`` (not returned) or ``max_new_tokens``.

    Args:
        chunks: this rank's, from :func:`nemo_pre.neva.model.model_chunks`.
        prompts: of different lengths, with or without images.
        vocab_size: ids from here on are padding of the embedding and never chosen.
        micro_batch_size: prompts that run at a time on a stage.
        cache: keep keys and values where the layout allows it.
        on_progress: called with (finished, all prompts) after each token.
        on_token: called with (number of the prompt, token) for each token, on every rank.

    Returns:
        New token ids per prompt, on every rank. One that reaches the model's longest sequence ends there.

    Raises:
        ValueError: a prompt leaves no room for an answer, or its image tokens and images differ in number.
    """
    from megatron.core import parallel_state as ps

    room = [_room(chunks[0], prompt, number) for number, prompt in enumerate(prompts)]
    answers: list[list[int]] = [[] for _ in prompts]
    wave = micro_batch_size * ps.get_pipeline_model_parallel_world_size()  # what the cache is made for at a time
    finished = 0
    with evaluating(chunks):
        for start in range(0, len(prompts), wave):
            numbers = range(start, min(start + wave, len(prompts)))
            limits = {number: min(max_new_tokens, room[number]) for number in numbers}
            with _decoder(
                chunks, [prompts[n] for n in numbers], limits, vocab_size, micro_batch_size, cache
            ) as decode:
                unfinished = [number for number in numbers if limits[number] > 0]
                while unfinished:
                    tokens = decode([answers[number] for number in numbers], [n - start for n in unfinished])
                    for number, token in zip(unfinished, tokens, strict=True):
                        if token == stop_token:
                            limits[number] = 0
                            continue
                        answers[number].append(token)
                        if on_token is not None:
                            on_token(number, token)
                    unfinished = [number for number in unfinished if len(answers[number]) < limits[number]]
                    if on_progress is not None:
                        on_progress(finished + len(numbers) - len(unfinished), len(prompts))
            finished += len(numbers)
    return answers


def _room(chunk: MCoreVisualNevaModel, prompt: TokenSequence, number: int) -> int:
    longest, used = chunk.max_sequence_length, combined_length(prompt, chunk)
    if used >= longest:
        raise ValueError(
            f"Prompt {number} has {used} tokens with its images and the model takes {longest}: "
            f"shorten it or raise data.sequence_length."
        )
    return longest - used


class Decode(Protocol):
    """The next tokens of the unfinished rows, given all rows' answers so far."""

    def __call__(self, answers: list[list[int]], unfinished: list[int]) -> list[int]: ...


@contextmanager
def _decoder(
    chunks: list[MCoreVisualNevaModel],
    prompts: list[TokenSequence],
    limits: dict[int, int],
    vocab_size: int,
    micro_batch_size: int,
    cache: bool,
) -> Iterator[Decode]:
    if not (cache and can_cache(chunks[0])):
        yield _WholePrefix(chunks, prompts, vocab_size, micro_batch_size)
        return
    batches = make_batches(chunks, prompts, micro_batch_size)
    kept = KeyValueCache([_room_for(chunks[0], batch, max(limits.values())) for batch in batches])
    with cached_attention(chunks, kept):
        yield _Cached(chunks, batches, kept, vocab_size)


class _WholePrefix:
    def __init__(
        self, chunks: list[MCoreVisualNevaModel], prompts: list[TokenSequence], vocab_size: int, micro_batch_size: int
    ) -> None:
        self._chunks, self._prompts = chunks, prompts
        self._vocab_size, self._micro_batch_size = vocab_size, micro_batch_size

    def __call__(self, answers: list[list[int]], unfinished: list[int]) -> list[int]:
        sequences = [_extended(self._prompts[row], answers[row]) for row in unfinished]
        batches = make_batches(self._chunks, sequences, self._micro_batch_size)
        length = batches[0].micro_batch.layout.sequence_length

        def choose(batch: Batch, logits: Tensor) -> Tensor:
            return _most_likely(last_logits(batch, logits), self._vocab_size)

        tokens = run(self._chunks, batches, length, run_whole, choose, torch.empty(0, 1, dtype=torch.int64))
        return tokens[: len(sequences), 0].tolist()


class _Cached:
    def __init__(
        self, chunks: list[MCoreVisualNevaModel], batches: list[Batch], cache: KeyValueCache, vocab_size: int
    ) -> None:
        self._chunks, self._batches, self._cache, self._vocab_size = chunks, batches, cache, vocab_size
        self._started = False

    def __call__(self, answers: list[list[int]], unfinished: list[int]) -> list[int]:
        if not self._started:
            self._started = True
            length = self._batches[0].micro_batch.layout.sequence_length
            tokens = self._run(self._batches, length, self._prefill, last_logits)
            return [tokens[row] for row in unfinished]
        for batch in self._cache.batches:
            batch.advance()
        rows = len(self._batches[0].tokens)
        latest = [answer[-1] if answer else PADDING for answer in answers]
        latest += [PADDING] * (len(self._batches) * rows - len(latest))
        self._latest = torch.tensor(latest).view(len(self._batches), rows, 1)
        # The interleaved schedule wants its number of micro-batches; elsewhere finished ones rest.
        running = {row // rows for row in unfinished} if len(self._chunks) == 1 else set(range(len(self._batches)))
        batches = [batch for number, batch in enumerate(self._batches) if number in running]
        tokens = self._run(batches, 1, self._step, lambda batch, logits: only_logits(logits))
        place = {number: position * rows for position, number in enumerate(sorted(running))}
        return [tokens[place[row // rows] + row % rows] for row in unfinished]

    def _run(
        self,
        batches: list[Batch],
        length: int,
        forward: Callable[[MCoreVisualNevaModel, Batch], Any],
        logits_of: Callable[[Batch, Tensor], Tensor],
    ) -> list[int]:
        def choose(batch: Batch, logits: Tensor) -> Tensor:
            return _most_likely(logits_of(batch, logits), self._vocab_size)

        nothing = torch.empty(0, 1, dtype=torch.int64)
        return run(self._chunks, batches, length, forward, choose, nothing).squeeze(1).tolist()

    def _prefill(self, chunk: MCoreVisualNevaModel, batch: Batch) -> Any:
        self._cache.current = self._cache.batches[batch.micro_batch.index]
        return run_whole(chunk, batch)

    def _step(self, chunk: MCoreVisualNevaModel, batch: Batch) -> Any:
        index = batch.micro_batch.index
        self._cache.current = self._cache.batches[index]
        return chunk.continue_text(self._latest[index].to(torch.cuda.current_device()))


def _room_for(chunk: MCoreVisualNevaModel, batch: Batch, new_tokens: int) -> CachedBatch:
    return cached_batch(
        batch.micro_batch.layout,
        chunk.stream_shape,
        batch.last_position + 1,
        new_tokens,
        torch.cuda.current_device(),
    )


def _extended(prompt: TokenSequence, answer: list[int]) -> TokenSequence:
    return replace(prompt, tokens=torch.cat([prompt.tokens, torch.tensor(answer, dtype=torch.int64)]))


def _most_likely(logits: Tensor, vocab_size: int) -> Tensor:
    return logits[:, :vocab_size].argmax(dim=1, keepdim=True)
