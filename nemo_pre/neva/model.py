"""NeVA's chunks and their configuration, without NeMo. Differences from NeMo's, each a defect there or a need here:

- The combined sequence is laid out by :mod:`nemo_pre.parallel.sequence_layout`, identically on every stage.
  (NeVA's mid-stage branch swaps labels and loss mask, leaves ``padded_seq_len`` unbound with sequence parallelism
  and overlapped TP communication at full length, and pads every batch to the maximum under pipelining.)
- A micro-batch without an image keeps the encoder and projector in the graph, so that overlapped gradient
  reductions do not wait for them.
- Virtual pipeline stages work: the language model's config learns of them, and chunks share one config.
- The visual tokens are handed to whoever asks (``on_visual_tokens``), and the micro-batch at hand is known.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from megatron.core import parallel_state as ps
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from nemo_pre.config.derived import fp8_multiple
from nemo_pre.config.schema import RopeScalingConfig
from nemo_pre.device_copies import to_device
from nemo_pre.neva.blocks import block_output, num_blocks
from nemo_pre.neva.chunk import VisionLanguageChunk, unwrapped
from nemo_pre.neva.mixed_attention import MixedAttention, SplitMixedAttention
from nemo_pre.neva.rotary import VisualRotaryEmbedding, inverse_frequency
from nemo_pre.neva.stored_tower import StoredTower
from nemo_pre.neva.vision import encoder_features, freeze_unused_layers
from nemo_pre.objectives.scale import StepPlan
from nemo_pre.parallel.auxiliary_gradient import scale_gradient
from nemo_pre.parallel.micro_batch import BranchStates, MicroBatch, VisualTokens
from nemo_pre.parallel.sequence_layout import (
    IGNORE_INDEX,
    IMAGE_TOKEN_INDEX,
    CombinedPlaces,
    Grid,
    combined_lengths,
    expand_labels,
    sequence_layout,
    square_tiles,
)
from nemo_pre.parallel.token_streams import StreamShape
from nemo_pre.terms.training import Branch, BranchListener, MicroBatchListener, ModelPart, VisualTokensListener

# What Megatron's schedules, wrappers and optimizers read of the whole model's configuration, and the decoder's says.
# NeVA copies the same.
OF_THE_DECODER = (
    "num_layers",
    "hidden_size",
    "num_attention_heads",
    "num_query_groups",
    "ffn_hidden_size",
    "kv_channels",
    "hidden_dropout",
    "attention_dropout",
    "fp32_residual_connection",
    "apply_residual_connection_post_layernorm",
    "init_method_std",
    "layernorm_epsilon",
    "layernorm_zero_centered_gamma",
    "add_bias_linear",
    "add_qkv_bias",
    "gated_linear_unit",
    "activation_func",
    "activation_func_fp8_input_store",
    "num_moe_experts",
    "rotary_interleaved",
    "window_size",
    "normalization",
    "qk_layernorm",
    "test_mode",
    "calculate_per_token_loss",
    "moe_token_dispatcher_type",
    "moe_router_load_balancing_type",
)


@dataclass
class VisualNevaConfig(TransformerConfig):
    """The whole model's configuration: its parts', how visual tokens attend and are placed, what training adds.

    Attributes:
        language_transformer_config: see :class:`nemo_pre.neva.decoder.DecoderConfig`.
        vision_transformer_config: see :class:`nemo_pre.neva.vision.VisionTowerConfig`.
        vision_projection_config: see :class:`nemo_pre.neva.projector.ProjectorConfig`.
        drop_vision_class_token: the decoder does not see the encoder's class token.
        vision_feature_layer: the layer of the encoder whose output is projected.
        freeze_language_model, freeze_vision_model, freeze_vision_projection: what is not trained.
        mixed_attention: visual tokens of an image see each other both ways (the layers' spec must have it).
        packed: rows hold several samples, which do not see each other (the layers' spec must have mixed attention).
        rope: ``1d``, ``2d`` or ``mrope``, see :mod:`nemo_pre.parallel.rotary_positions`.
        rope_axes: see :func:`nemo_pre.config.derived.axis_of_frequency`.
        rope_scaling: how its frequencies are slowed down.
        parts: what training adds to the model and inference drops, such as heads.
        branch: a second sequence runs beside the samples; a part of the model must say how.
        whole_images: micro-batches say how images that ranks cut are brought together.
        labelled_output: the output layer runs at tokens with a label alone, where one rank has whole sequences.
    """

    num_layers: int = 1  # the decoder's, from the start on
    num_attention_heads: int = 8  # likewise
    language_transformer_config: Any = None
    vision_transformer_config: Any = None
    vision_projection_config: Any = None
    drop_vision_class_token: bool = True
    vision_feature_layer: int = -2
    freeze_language_model: bool = False
    freeze_vision_model: bool = False
    freeze_vision_projection: bool = False
    mixed_attention: bool = False
    packed: bool = False
    rope: str = "1d"
    rope_axes: list[int] | None = None
    rope_scaling: RopeScalingConfig = field(default_factory=RopeScalingConfig)
    parts: dict[str, ModelPart] = field(default_factory=dict)
    branch: bool = False
    whole_images: bool = False
    labelled_output: bool = False

    @property
    def decoder_layers(self) -> int:
        """Layers of the whole decoder, as users count them."""
        return num_blocks(self.language_transformer_config)

    def __post_init__(self) -> None:
        # Not Megatron's: the decoder's configuration has checked itself, and this one has no layers of its own.
        for name in OF_THE_DECODER:
            setattr(self, name, getattr(self.language_transformer_config, name))

    @property
    def explicit_positions(self) -> bool:
        """Whether every token is told its rotary position; otherwise Megatron counts."""
        return self.rope != "1d" or self.branch or self.packed

    def configure_model(self, vp_stage: int | None = None) -> MCoreVisualNevaModel:
        """This rank's chunk of the virtual pipeline stage ``vp_stage``, with everything that training adds to it.

        Raises:
            ValueError: a second sequence runs beside the samples, and attention would not keep them apart; or the
                decoder takes no positions of each token.
        """
        language = self.language_transformer_config
        for name in (
            "virtual_pipeline_model_parallel_size",
            "microbatch_group_size_per_vp_stage",
            "num_layers_in_first_pipeline_stage",
            "num_layers_in_last_pipeline_stage",
            "pipeline_dtype",
        ):
            setattr(language, name, getattr(self, name))
        for name in (
            "tensor_model_parallel_size",
            "sequence_parallel",
            "pipeline_model_parallel_size",
            "context_parallel_size",
        ):
            setattr(language, name, getattr(self, name))
        hybrid = getattr(language, "hybrid_layer_pattern", None) is not None
        if hybrid and (self.explicit_positions or self.mixed_attention):
            raise ValueError(
                "A HybridModel takes neither positions of each token nor attention that keeps images apart: set "
                "model.rope=1d, model.attention=causal and data.packing=false, and leave out LaVer, which needs them."
            )
        if self.branch and not self.mixed_attention:
            raise ValueError("A sequence beside the samples needs attention that keeps images apart: mixed attention.")
        if self.explicit_positions:
            # Megatron's name for positions that are given; how they turn heads is VisualRotaryEmbedding's business.
            language.position_embedding_type, language.mrope_section = "mrope", []
            language.apply_rope_fusion = False  # the fused kernel knows one sequence of positions for all rows
        language.scatter_embedding_sequence_parallel = False
        # At a step's first micro-batch Megatron has FP8 copies of the weights made anew if this configuration, the
        # whole model's, says fp8. NeMo sets it back before it builds the model. Layers look at their own.
        self.fp8 = language.fp8
        self.vision_projection_config.tensor_model_parallel_size = self.tensor_model_parallel_size

        # Lightning configures the first chunk without saying which virtual stage it is.
        if vp_stage is None and self.virtual_pipeline_model_parallel_size is not None:
            vp_stage = 0
        first = ps.is_pipeline_first_stage(ignore_virtual=False, vp_stage=vp_stage)
        last = ps.is_pipeline_last_stage(ignore_virtual=False, vp_stage=vp_stage)
        return MCoreVisualNevaModel(self, pre_process=first, post_process=last, vp_stage=vp_stage)


class MCoreVisualNevaModel(VisionLanguageChunk):
    """One chunk of the model: on the first stage with encoder and projector, on the last with the output layer.

    Attributes:
        on_micro_batch: called when a micro-batch enters this chunk.
        on_visual_tokens: called on the first stage with each micro-batch's visual tokens.
        on_branch: called on the last stage with the branch's final states and the chunk's output, which they return.
        branch: how it runs a second sequence beside the samples; None without one.
        micro_batch: the micro-batch of the latest forward pass.
        observed: whether listeners and taps see forward passes; see :func:`unobserved`.
    """

    def __init__(
        self, config: VisualNevaConfig, pre_process: bool, post_process: bool, vp_stage: int | None = None
    ) -> None:
        super().__init__(config, pre_process, post_process, vp_stage)
        self.on_micro_batch: list[MicroBatchListener] = []
        self.on_visual_tokens: list[VisualTokensListener] = []
        self.on_branch: list[BranchListener] = []
        self.branch: Branch | None = None
        self._branch_output: Tensor | None = None
        self.micro_batch: MicroBatch | None = None
        self.observed = True
        if pre_process:
            freeze_unused_layers(self.vision_model, config.vision_feature_layer)
        self._splits_attention = False
        if config.mixed_attention or config.packed:
            self._refuse_other_attention()
        if config.explicit_positions:
            self._place_tokens(config)
        elif config.rope_scaling.kind != "none":
            self.language_model.rotary_pos_emb.inv_freq = self.inverse_frequency().to(
                self.language_model.rotary_pos_emb.inv_freq.device
            )
        for part in config.parts.values():
            part.add_to(self)

    def _refuse_other_attention(self) -> None:
        """A layer that does not know of token structures would be causal, or worse, and say nothing."""
        for layer in self.language_model.decoder.layers:
            attention = layer.self_attention.core_attention
            if not isinstance(attention, MixedAttention):
                raise ValueError(
                    f"Mixed attention or packing was asked for, but decoder layer {layer.layer_number} has "
                    f"{type(attention).__name__}: put it into the layer spec with "
                    f"nemo_pre.neva.mixed_attention.with_mixed_attention."
                )
            self._splits_attention |= isinstance(attention, SplitMixedAttention)

    def _place_tokens(self, config: VisualNevaConfig) -> None:
        frequency = self.inverse_frequency()
        self.language_model.rotary_pos_emb = VisualRotaryEmbedding(frequency, config.rope_axes or [0] * len(frequency))

    def inverse_frequency(self) -> Tensor:
        """Inverse frequencies of the rotary embedding, on the CPU."""
        language = self.config.language_transformer_config
        return inverse_frequency(language.kv_channels, language.rotary_base, self.config.rope_scaling)

    def run_beside_samples(self, branch: Branch) -> None:
        """Run a second sequence beside the samples from now on, as ``branch`` says."""
        self.branch = branch
        self.language_model.decoder.register_forward_hook(self._set_branch_aside)

    @property
    def native(self) -> bool:
        """Whether images differ in their number of visual tokens."""
        return getattr(self.config.vision_transformer_config, "native", False)

    def image_tiles(self, tiles_per_image: Sequence[int], grids: Sequence[Grid] | None) -> list[list[Grid]]:
        """The tiles of each image: with native resolution one of the given ``grids`` each, else squares."""
        if not self.native:
            return square_tiles(tiles_per_image, self.tile_tokens)
        assert grids is not None or not tiles_per_image, "native resolution needs every image's grid"
        return [[grid] for grid in grids or []]

    def decoder_layer(self, number: int) -> nn.Module | None:
        """The decoder layer with this 1-based number in the whole model, if this chunk has it."""
        return block_output(self.language_model, number)

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor | None = None,
        loss_mask: Tensor | None = None,
        attention_mask: Tensor | None = None,
        images: Tensor | None = None,
        labels: Tensor | None = None,
        num_image_tiles: list[int] | None = None,
        image_grids: list[Grid] | None = None,
        micro_batch: MicroBatch | None = None,
        runtime_gather_output: bool | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Run this chunk on one micro-batch.

        Args:
            input_ids: ``[B, T]``, -200 standing for an image.
            images: ``[num_tiles, 3, H, W]`` or None, with ``data.features`` the encoder's output of them
                ``[num_tiles, tile_tokens, d_vision]``; read on the first stage.
            labels, loss_mask: ``[B, T]``; read on the last stage. Without them it returns logits.
            num_image_tiles: tiles of each image; None means one each.
            image_grids: of native resolution, rows and columns of visual tokens of each image.
            micro_batch: layout and counts; None lays this micro-batch out by itself.

        Returns:
            Losses ``[B, S]`` and their mask ``[B, S]`` with labels, else logits ``[B, S, vocabulary]``, on the
            last stage (S is the context-parallel shard's length); hidden states elsewhere.
        """
        if micro_batch is None:
            micro_batch = self.lay_out(input_ids, num_image_tiles, image_grids)
        self.micro_batch = micro_batch = self._on_this_rank(micro_batch)
        for enter in self.on_micro_batch if self.observed else ():
            enter(micro_batch)

        student, teacher = self._enter_chunk(input_ids, position_ids, images, micro_batch)
        if teacher is not None:
            teacher = self._run_teacher(teacher, micro_batch)
        has_labels = self.post_process and labels is not None and loss_mask is not None
        if has_labels:
            labels, loss_mask = expand_labels(micro_batch.layout, labels, loss_mask, IGNORE_INDEX)
            labels, loss_mask = self.context_shard(labels, 1), self.context_shard(loss_mask, 1)
        streams = micro_batch.streams
        few = has_labels and self.config.labelled_output
        with self.without_output_layer() if few else nullcontext():
            output = self.language_model(
                input_ids=None,
                position_ids=streams.positions_3BQ if streams is not None else None,
                attention_mask=streams.structure_BK3 if streams is not None else attention_mask,
                decoder_input=student,
                labels=labels if has_labels and not few else None,
                runtime_gather_output=runtime_gather_output,
            )
        self._forget_input()
        if few:
            assert labels is not None and loss_mask is not None
            output = self._losses_of_labelled(output, labels, loss_mask > 0)
        if teacher is not None:
            output = self._leave_chunk(output, teacher, micro_batch)
        if not has_labels:
            return output
        assert loss_mask is not None
        return scale_gradient(output, micro_batch.plan.weights.get("lm", 1.0)), loss_mask.contiguous()

    @contextmanager
    def without_output_layer(self) -> Iterator[None]:
        """The last stage's language model gives its last layer's states ``[S, B, d]``, normed, for logits."""
        self.language_model.post_process = False
        try:
            yield
        finally:
            self.language_model.post_process = True

    def _losses_of_labelled(self, states_SBd: Tensor, labels_BS: Tensor, labelled_BS: Tensor) -> Tensor:
        """Cross-entropies ``[B, S]`` of the tokens with a label, zeros elsewhere. Of the sequence only these go
        through the output layer, which a large vocabulary makes a fourth of a small model. How many they are the host
        waits for, on a GPU.

        They are chosen in the states' own order: chosen of a transposed view, every layer's gradient would be strided,
        and a processor multiplies such by a weight forty times slower.
        """
        labelled_SB, labels_SB = labelled_BS.t(), labels_BS.t()
        logits = self.logits_of(states_SBd[labelled_SB])
        losses = self.language_model.compute_language_model_loss(labels_SB[labelled_SB][None], logits[:, None])
        return losses.new_zeros(labels_SB.shape).masked_scatter(labelled_SB, losses[0]).t().contiguous()

    def logits_of(self, states: Tensor) -> Tensor:
        """This tensor-parallel rank's logits ``[n, V]`` of normed states ``[n, d]``, on the last stage."""
        language = self.language_model
        shared = language.share_embeddings_and_output_weights
        weight = language.shared_embedding_or_output_weight() if shared else None
        logits: Tensor = language.output_layer(states[:, None], weight=weight)[0]
        return logits[:, 0]

    @property
    def stream_shape(self) -> StreamShape:
        """How this model's tokens attend, are placed, and are cut over ranks."""
        return StreamShape(
            mixed_attention=self.config.mixed_attention,
            rope=self.config.rope,
            packed=self.config.packed,
            tp_size=ps.get_tensor_model_parallel_world_size() if self.sequence_parallel_lm else 1,
            cp_size=ps.get_context_parallel_world_size(),
            cp_rank=ps.get_context_parallel_rank(),
            structure_on_host=self._splits_attention,
        )

    def _on_this_rank(self, micro_batch: MicroBatch) -> MicroBatch:
        tp_rank = ps.get_tensor_model_parallel_rank() if self.sequence_parallel_lm else 0
        plain = not (self.config.explicit_positions or self.config.mixed_attention)
        return micro_batch.on_this_rank(self.stream_shape, tp_rank, plain, self.pre_process, self.config.whole_images)

    def continue_text(self, tokens_B1: Tensor) -> Tensor:
        """Run this chunk on one more text token per row; :mod:`nemo_pre.neva.key_value_cache` holds those before.

        Returns:
            Logits ``[B, 1, vocabulary]`` on the last stage, hidden states ``[1, B, d]`` elsewhere.
        """
        hidden_states = None
        if self.pre_process:
            hidden_states = self.language_model.embedding(input_ids=tokens_B1, position_ids=None)
        else:
            self.language_model.set_input_tensor(self._received)
        output = self.language_model(
            input_ids=None, position_ids=None, attention_mask=None, decoder_input=hidden_states
        )
        self._forget_input()
        return output

    def set_input_tensor(self, input_tensor: Any) -> None:
        """What the former stage sent; it is taken apart when the micro-batch is known."""
        self._received = input_tensor[0] if isinstance(input_tensor, list) else input_tensor

    def _forget_input(self) -> None:
        """Megatron's block would keep it, and with it its gradient, until the next comes."""
        self._received = None
        self.language_model.set_input_tensor(None)

    def _enter_chunk(
        self, input_ids: Tensor, position_ids: Tensor | None, images: Tensor | None, micro_batch: MicroBatch
    ) -> tuple[Tensor | None, Tensor | None]:
        """This rank's decoder input for the student (on later stages left with the decoder) and the teacher."""
        if self.pre_process:
            samples, masked, unmasked = self._embed(input_ids, position_ids, images, micro_batch)
            student = self.shard(samples)
            if masked is not None:
                student = torch.cat([student, self.shard(masked)])
            return student, None if unmasked is None else self.shard(unmasked)
        received, teacher = self._received, None
        if micro_batch.branch is not None:
            assert micro_batch.streams is not None
            student_length = sum(micro_batch.streams.lengths)
            received, teacher = received[:student_length], received[student_length:].detach()
        self.language_model.set_input_tensor(received)
        return None, teacher

    def _run_teacher(self, branch: Tensor, micro_batch: MicroBatch) -> Tensor:
        streams = micro_batch.teacher_streams
        assert streams is not None
        rotary = self.language_model.rotary_pos_emb(streams.positions_3BQ)
        assert self.branch is not None
        return self.branch.run_teacher(branch, streams.structure_BK3, rotary)

    def _set_branch_aside(self, decoder: nn.Module, _: Any, output: Tensor) -> Tensor:
        """Take the branch out of the last decoder layer's output: words are predicted for the samples alone."""
        assert self.micro_batch is not None
        if not self.post_process or self.micro_batch.branch is None:
            return output
        assert self.micro_batch.streams is not None
        samples, branch = output.split(list(self.micro_batch.streams.lengths))
        self._branch_output = branch
        return samples

    def _leave_chunk(self, output: Tensor, teacher: Tensor, micro_batch: MicroBatch) -> Tensor:
        """Append the teacher's branch to what goes to the next stage; on the last, show both branches to the
        listeners."""
        if not self.post_process:
            return torch.cat([output, teacher])
        assert self._branch_output is not None
        states = BranchStates(self._branch_output.flatten(0, 1), teacher.flatten(0, 1))
        self._branch_output = None
        for receive in self.on_branch if self.observed else ():
            output = receive(self, micro_batch, states, output)
        return output

    def lay_out(
        self, input_ids: Tensor, num_image_tiles: list[int] | None, image_grids: list[Grid] | None = None
    ) -> MicroBatch:
        """A micro-batch by itself, for inference and evaluation outside a planned step."""
        tokens = input_ids.cpu()
        counts = num_image_tiles or [1] * int((tokens == IMAGE_TOKEN_INDEX).sum())
        tiles = self.image_tiles(counts, image_grids)
        length = self.padded_length(int(combined_lengths(tokens, tiles, IMAGE_TOKEN_INDEX).max()))
        layout = sequence_layout(tokens, tiles, IMAGE_TOKEN_INDEX, length)
        plan = StepPlan(1, length)
        return MicroBatch(index=0, plan=plan, layout=layout)

    def padded_length(self, longest: int) -> int:
        """The length a batch whose longest sample has ``longest`` tokens is padded or cut to."""
        if self.tp_comm_overlap_lm:  # its buffers are allocated once, for the maximum
            return self.max_sequence_length
        factor = self._length_factor
        return min(-(-longest // factor) * factor, self.max_sequence_length)

    def sharded_length(self, longest: int) -> int:
        """``longest`` rounded up so that every rank of sequence and context parallelism has the same share, at least
        one token."""
        factor = self._length_factor
        return max(-(-longest // factor), 1) * factor

    @property
    def _length_factor(self) -> int:
        """What a length is a multiple of, so that all ranks have the same share and FP8 can multiply it."""
        language = self.config.language_transformer_config
        recipe = language.fp8_recipe if language.fp8 else None
        return self.shard_factor * fp8_multiple(recipe, self.sequence_parallel_lm)

    def _embed(
        self, input_ids: Tensor, position_ids: Tensor | None, images: Tensor | None, micro_batch: MicroBatch
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Embeddings ``[S, B, d]`` of the samples, of the branch as the student sees it, and as the teacher does."""
        text_BTd = self.language_model.embedding(
            input_ids=input_ids.clamp(min=0), position_ids=position_ids
        ).transpose(0, 1)
        if images is not None and len(images) > 0:
            grids = [grid for tiles in micro_batch.layout.image_tiles for grid in tiles] if self.native else None
            visual = self._encode(images, grids, micro_batch.pixels)
            visual.targets = {name: stored.flatten(0, 1) for name, stored in micro_batch.targets.items()}
        else:
            visual = self._no_visual_tokens(text_BTd.shape[2])
            text_BTd = text_BTd + self._zero_from_vision()
        assert micro_batch.places is not None
        length = micro_batch.layout.sequence_length
        samples = _combine(micro_batch.places, length, text_BTd, visual.tokens)
        masked = unmasked = None
        if micro_batch.branch is not None:
            assert self.branch is not None and micro_batch.branch_places is not None
            length = micro_batch.branch.layout.sequence_length
            whole = _combine(micro_batch.branch_places, length, text_BTd, visual.tokens)
            hidden_BS = to_device(micro_batch.branch.masked_BS, whole.device)
            mask_token = self.branch.mask_token()
            masked = torch.where(hidden_BS[..., None], mask_token, whole).transpose(0, 1).contiguous()
            unmasked = whole.detach().transpose(0, 1).contiguous()
        for receive in self.on_visual_tokens if self.observed else ():
            receive(self, micro_batch, visual)
        return samples.transpose(0, 1).contiguous(), masked, unmasked

    def _encode(self, images: Tensor, grids: list[Grid] | None, pixels: Tensor | None) -> VisualTokens:
        """Visual tokens of ``images``, which are what the first stage reads: with ``data.features`` the encoder's
        output, and ``pixels`` the images themselves where a loss looks at them."""
        if isinstance(self.vision_model, StoredTower):
            features = images.to(next(self.vision_projection.parameters()).dtype)
        else:
            pixels = images  # as they came: what looks at them rounds them itself
            seen = images.to(next(self.vision_model.parameters()).dtype)
            tower = self.vision_model.eval()
            if grids is not None:
                features = tower(seen, grids)
                return VisualTokens(features, self.vision_projection(features), pixels)
            features = encoder_features(tower, seen, self.config.vision_feature_layer, self.tile_tokens)
        # NeVA's projectors see [tile_tokens, num_tiles, d_vision].
        tokens = self.vision_projection(features.transpose(0, 1).contiguous()).transpose(0, 1)
        return VisualTokens(features.flatten(0, 1), tokens.flatten(0, 1), pixels)

    def _no_visual_tokens(self, width: int) -> VisualTokens:
        some = next(self.vision_projection.parameters()).detach()
        features = some.new_zeros(0, self.config.vision_projection_config.input_size)
        return VisualTokens(features, some.new_zeros(0, width), None)

    def _zero_from_vision(self) -> Tensor:
        """A zero from a blank image, through whatever of encoder and projector is trained.

        Reductions of gradients that are overlapped wait for every parameter, and replicas have to give theirs in one
        order, those without an image too: a bucket is reduced when its last gradient is there.
        """
        some = next(self.vision_projection.parameters())
        if any(parameter.requires_grad for parameter in self.vision_model.parameters()):
            image, grids = self.config.vision_transformer_config.blank_image(some.device)
            tokens = self._encode(image, grids, None).tokens
        elif some.requires_grad:
            tokens = self.vision_projection(some.new_zeros(1, 1, self.config.vision_projection_config.input_size))
        else:
            return some.new_zeros(())
        return tokens.sum() * 0


def _combine(places: CombinedPlaces, length: int, text_BTd: Tensor, visual_tokens: Tensor) -> Tensor:
    """Text and visual tokens at their places ``[B, length, d]``, zeros at padding."""
    combined = text_BTd.new_zeros(len(text_BTd), length, text_BTd.shape[2])
    text, visual = places.text, places.visual
    combined[text.row, text.column] = text_BTd[text.row, text.source]
    combined[visual.row, visual.column] = visual_tokens[visual.source].to(combined.dtype)
    return combined


def model_chunks(trainer: Any) -> list[MCoreVisualNevaModel]:
    """The unwrapped chunks that this rank's NeMo trainer holds, in the order of their virtual stages."""
    chunks = []
    for wrapped in trainer.strategy.megatron_parallel:
        chunk = unwrapped(wrapped)
        if not isinstance(chunk, MCoreVisualNevaModel):
            raise ValueError(f"The model is a {type(chunk).__name__}: build it with nemo_pre.train.build_model.")
        chunks.append(chunk)
    return chunks


@contextmanager
def unobserved(chunks: list[MCoreVisualNevaModel]) -> Iterator[None]:
    """Forward passes inside belong to no step (generation, evaluation): no listener and no tap sees them.

    Every pipeline stage must enter it: what one stage publishes another would have to take.
    """
    for chunk in chunks:
        chunk.observed = False
    try:
        yield
    finally:
        for chunk in chunks:
            chunk.observed = True
