"""The visual tokens of a checkpoint's model, taken on whatever pipeline stage has the layer.

A batch of pictures runs through the pipeline once; hooks keep each stage's layers. What enters the decoder exists on
the first stage only and is broadcast to the others after the pass, when no message of the schedule is under way.
Ranks of tensor and context parallelism see the same tokens and share the layers' measures between them; pieces of a
cut sequence, and attention heads, are gathered. Data-parallel replicas share the pictures (:mod:`.replicas`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from nemo_pre.config.run import RunConfig
from nemo_pre.data.conversation import IMAGE_TAG, encode_prompt
from nemo_pre.data.dataset import Preprocessing
from nemo_pre.data.images import image_tensor
from nemo_pre.diagnostics.replicas import Replicas
from nemo_pre.diagnostics.samples import DiagnosticSample
from nemo_pre.diagnostics.states import (
    Grid,
    VisualStates,
    asking_tokens,
    attention_mass,
    instance_patches,
    square_patches,
    token_classes,
)
from nemo_pre.generation import TokenSequence
from nemo_pre.generation.forward import Batch, evaluating, make_batches, run_to_states, run_whole
from nemo_pre.generation.forward import run as run_pipeline
from nemo_pre.neva.model import MCoreVisualNevaModel
from nemo_pre.parallel.sequence_layout import SequenceLayout
from nemo_pre.parallel.token_streams import may_attend, samples_structure

if TYPE_CHECKING:
    from PIL.Image import Image

Visit = Callable[[MCoreVisualNevaModel, int, Any], None]  # chunk, layer, what it gave


class MegatronModel:
    """This rank's part of a model; all ranks ask for the same samples together.

    Args:
        chunks: this rank's, from :func:`nemo_pre.inference.load_chunks` or of a run that trains.
        how: the run's preprocessing; of a picture in tiles the one that shows all of it is asked for.
        background: see :class:`nemo_pre.diagnostics.samples.DiagnosticData`.
        rows: pictures in a micro-batch.
    """

    def __init__(
        self, chunks: list[MCoreVisualNevaModel], how: Preprocessing, run: RunConfig, background: int | None, rows: int
    ) -> None:
        from megatron.core import parallel_state as ps

        self._chunks, self._how, self._run, self._background = chunks, how, run, background
        self._rows = rows
        cut = chunks[0].sequence_parallel_lm and ps.get_tensor_model_parallel_world_size() > 1
        self._groups = [
            group
            for group, over in (
                (ps.get_tensor_model_parallel_group(), cut),
                (ps.get_context_parallel_group(), ps.get_context_parallel_world_size() > 1),
            )
            if over
        ]
        context = ps.get_context_parallel_world_size()
        self._peer = ps.get_tensor_model_parallel_rank() * context + ps.get_context_parallel_rank()
        self._peers = ps.get_tensor_model_parallel_world_size() * context
        self.replicas = Replicas()
        if ps.get_data_parallel_world_size() > 1:
            self.replicas = Replicas(
                ps.get_data_parallel_rank(),
                ps.get_data_parallel_world_size(),
                ps.get_data_parallel_group(),
                ps.get_data_parallel_group_gloo(),
            )
        self.num_layers = run.model.language.num_layers
        self.vocabulary = min(len(how.tokenizer), run.model.language.vocab_size)
        image_token = how.tokenizer.convert_tokens_to_ids(IMAGE_TAG)
        unknown = image_token in (None, how.tokenizer.unk_token_id)
        self._image_token = None if unknown or image_token >= self.vocabulary else image_token

    def shown(self, sample: DiagnosticSample) -> Image:
        from PIL import Image

        how = self._how
        resize = (how.image_resize, how.image_filter, how.image_crop_from)
        pixels = image_tensor(sample.picture, how.image_size, (0.0,) * 3, (1.0,) * 3, sample.key, *resize)
        return Image.fromarray((pixels * 255).round().clamp(0, 255).byte().permute(1, 2, 0).numpy())

    def word(self, token: int) -> str:
        return str(self._how.tokenizer.decode([token]))

    def describe(self) -> dict[str, Any]:
        parallel = self._run.parallel
        layout = {"tensor": parallel.tensor, "pipeline": parallel.pipeline}
        return {"source": "checkpoint", "path": getattr(self._run, "checkpoint", ""), "layout": layout}

    def states(self, samples: Sequence[DiagnosticSample], everything: bool) -> VisualStates:
        assert not (everything and self._groups), "attention and words are read off whole sequences"
        with evaluating(self._chunks):
            batches = make_batches(self._chunks, [self._sequence(sample) for sample in samples], self._rows)
            kept = _Kept(batches, self._groups, self._image_token, self.vocabulary)
            with _hooks(self._chunks, kept, everything):
                forward = kept.run_with_words if everything else run_to_states
                length = batches[0].micro_batch.layout.sequence_length
                nothing = torch.empty(0, 1, device=torch.cuda.current_device())
                run_pipeline(self._chunks, batches, length, forward, _no_rows, nothing)
        size = self._chunks[0].tile_tokens
        count = len(samples) * size
        if any(batch.micro_batch.layout.num_visual_tokens != len(batch.tokens) * size for batch in batches):
            raise ValueError("A picture does not fit into the model's longest sequence: ask shorter questions.")
        side = math.isqrt(size)
        masks = [self._mask_patches(sample, side) for sample in samples]
        grids = [Grid(0, side, side)] * len(samples)
        tokens = {layer: torch.cat(parts)[:count] for layer, parts in kept.tokens.items()}
        image = torch.arange(len(samples), device=torch.cuda.current_device()).repeat_interleave(size)
        return VisualStates(
            image=image,
            grids=grids,
            classes=token_classes(
                masks,
                grids,
                [size] * len(samples),
                self._background,
            ),
            entering=self._on_every_stage(tokens.get(0), count),
            layers={layer: states for layer, states in tokens.items() if self._measures(layer)},
            attention={
                layer: torch.cat(parts)[: len(samples)]
                for layer, parts in kept.attention.items()
                if self._measures(layer)
            },
            words=torch.cat(kept.words)[:count] if kept.words and self._peer == 0 else None,
            instances=instance_patches(masks),
        )

    @torch.no_grad()
    def scores(self, tokens: Tensor) -> Tensor:
        language = self._chunks[-1].language_model
        assert self._peers == 1 and self._chunks[-1].post_process and self._chunks[0].pre_process, "on one rank only"
        states = language.decoder.final_layernorm(tokens.to(next(language.parameters()).dtype)[:, None])
        return self._chunks[-1].logits_of(states[:, 0])[:, : self.vocabulary].float()

    def text_loss(self, passages: Sequence[Tensor]) -> tuple[float, int]:
        assert self._peers == 1, "on one rank only"

        def losses(batch: Batch, logits: Tensor) -> Tensor:
            """Losses among the words there are, since the vocabulary is padded."""
            scores = logits[:, :-1, : self.vocabulary].float().transpose(1, 2)
            words = batch.tokens[:, 1:].to(scores.device)
            return torch.nn.functional.cross_entropy(scores, words, reduction="none").double().sum(1, keepdim=True)

        with evaluating(self._chunks):
            batches = make_batches(self._chunks, [TokenSequence(passage) for passage in passages], self._rows)
            length = batches[0].micro_batch.layout.sequence_length
            rows = run_pipeline(self._chunks, batches, length, run_whole, losses, torch.empty(0, 1).double())
        return float(rows[: len(passages)].sum()), sum(len(passage) - 1 for passage in passages)

    def token_ids(self, words: str) -> list[int]:
        return list(self._how.tokenizer(words, add_special_tokens=False)["input_ids"])

    def _measures(self, layer: int) -> bool:
        return layer % self._peers == self._peer

    def _sequence(self, sample: DiagnosticSample) -> TokenSequence:
        how = self._how
        where = f"sample {sample.key}"
        turn = [{"from": "human", "value": sample.question}]
        tokens = encode_prompt(turn, how.tokenizer, how.chat_template, 1, where)
        resize = (how.image_resize, how.image_filter, how.image_crop_from)
        pixels = image_tensor(sample.picture, how.image_size, how.image_mean, how.image_std, where, *resize)
        return TokenSequence(torch.tensor(tokens, dtype=torch.int64), pixels[None])

    def _mask_patches(self, sample: DiagnosticSample, side: int) -> Tensor | None:
        mask = sample.marked_mask
        if mask is None:
            return None
        how = self._how
        resize = (how.image_resize, "nearest", how.image_crop_from)
        pixels = image_tensor(mask, how.image_size, (0.0,) * 3, (1.0,) * 3, sample.key, *resize)
        return square_patches((pixels * 255).round(), side, side)

    def _on_every_stage(self, entering: Tensor | None, count: int) -> Tensor:
        from megatron.core import parallel_state as ps

        width = self._chunks[0].config.language_transformer_config.hidden_size
        if entering is None:
            tokens = torch.empty(count, width, device=torch.cuda.current_device())
        else:
            tokens = entering.float().contiguous()
        if ps.get_pipeline_model_parallel_world_size() > 1:
            first, group = ps.get_pipeline_model_parallel_first_rank(), ps.get_pipeline_model_parallel_group()
            dist.broadcast(tokens, src=first, group=group)
        return tokens


class _Kept:
    """What the hooks of one pass see, micro-batch by micro-batch."""

    def __init__(self, batches: list[Batch], groups: list[Any], image_token: int | None, vocabulary: int) -> None:
        self._batches, self._groups = batches, groups
        self._image_token, self._vocabulary = image_token, vocabulary
        self.tokens: dict[int, list[Tensor]] = {}
        self.attention: dict[int, list[Tensor]] = {}
        self.words: list[Tensor] = []

    def add_tokens(self, chunk: MCoreVisualNevaModel, layer: int, hidden_states: Tensor) -> None:
        """``[S, B, d]`` or this rank's part of it; kept whole, in the order of pictures and patches."""
        assert chunk.micro_batch is not None and chunk.micro_batch.local is not None
        local = chunk.micro_batch.local
        rows = hidden_states.reshape(-1, hidden_states.shape[-1])[local.position]
        tokens = rows.new_zeros(chunk.micro_batch.layout.num_visual_tokens, rows.shape[1])
        tokens[local.source] = rows
        for group in self._groups:  # each token is on one rank: adding zeros changes nothing
            dist.all_reduce(tokens, group=group)
        self.tokens.setdefault(layer, []).append(tokens)

    def add_attention(self, chunk: MCoreVisualNevaModel, layer: int, inputs: tuple[Tensor, Tensor]) -> None:
        """Queries ``[S, B, N, D]`` and keys ``[S, B, G, D]``, after the rotary embedding."""
        from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region

        assert chunk.micro_batch is not None
        batch = self._batches[chunk.micro_batch.index]
        query, key = (states.permute(1, 2, 0, 3).float() for states in inputs)
        key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
        structure = samples_structure(batch.micro_batch.layout, chunk.config.mixed_attention)
        seen = may_attend(structure, structure).to(query.device)[:, None]
        scores = query @ key.transpose(2, 3) / math.sqrt(query.shape[-1])
        weights = scores.masked_fill(~seen, float("-inf")).softmax(dim=3)
        is_visual = _is_visual(batch.micro_batch.layout).to(query.device)
        mass = attention_mass(weights, is_visual, asking_tokens(is_visual, _is_text(batch).to(query.device)))
        self.attention.setdefault(layer, []).append(gather_from_tensor_model_parallel_region(mass))

    def run_with_words(self, chunk: MCoreVisualNevaModel, batch: Batch) -> Tensor:
        from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region

        output: Tensor = run_to_states(chunk, batch)
        if chunk.post_process:
            visual = output.transpose(0, 1)[_is_visual(batch.micro_batch.layout).to(output.device)]
            logits = chunk.logits_of(visual).float()
            scores = gather_from_tensor_model_parallel_region(logits)[:, : self._vocabulary]
            if self._image_token is not None:
                scores[:, self._image_token] = float("-inf")  # it is never said
            self.words.append(scores.argmax(1))
        return output


@contextmanager
def _hooks(chunks: list[MCoreVisualNevaModel], kept: _Kept, everything: bool) -> Iterator[None]:
    handles = []
    for chunk in chunks:
        for layer in chunk.language_model.decoder.layers:
            number = layer.layer_number
            if number == 1:
                handles.append(layer.register_forward_pre_hook(_entering(chunk, kept.add_tokens), with_kwargs=True))
            handles.append(layer.register_forward_hook(_output(chunk, number, kept.add_tokens)))
            if everything:
                attention = layer.self_attention.core_attention
                hook = _queries_and_keys(chunk, number, kept.add_attention)
                handles.append(attention.register_forward_pre_hook(hook))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _entering(chunk: MCoreVisualNevaModel, visit: Visit) -> Any:
    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        visit(chunk, 0, args[0] if args else kwargs["hidden_states"])

    return hook


def _output(chunk: MCoreVisualNevaModel, number: int, visit: Visit) -> Any:
    return lambda _, __, output: visit(chunk, number, output[0])


def _queries_and_keys(chunk: MCoreVisualNevaModel, number: int, visit: Visit) -> Any:
    return lambda _, args: visit(chunk, number, args[:2])


def _is_visual(layout: SequenceLayout) -> Tensor:
    return layout.visual_source_BS >= 0


def _is_text(batch: Batch) -> Tensor:
    """Boolean ``[B, S]``: text of the prompt, and not what it is padded with."""
    layout = batch.micro_batch.layout
    return (layout.text_source_BS >= 0) & (torch.arange(layout.sequence_length) <= batch.last_position[:, None])


def _no_rows(batch: Batch, output: Tensor) -> Tensor:
    return output.new_zeros(len(batch.tokens), 1, dtype=torch.float32)
