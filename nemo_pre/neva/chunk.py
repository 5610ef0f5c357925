"""What a chunk of a vision-language model is made of: encoder and projector on the first stage, and layers.

The parts are put together as NeMo's NeVA puts them, which takes them from Megatron-Core's ``LLaVAModel``.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core import tensor_parallel
from megatron.core.enums import ModelType
from megatron.core.transformer.module import MegatronModule
from torch import Tensor, nn


class VisionLanguageChunk(MegatronModule):
    """Encoder, projector and decoder of one chunk, as Megatron's schedules and reductions look at them.

    Args:
        config: of the whole model; see :class:`nemo_pre.neva.model.VisualNevaConfig`.
        pre_process: encoder, projector and embedding belong to it.
        post_process: the output layer does.
        vp_stage: its virtual pipeline stage; None without interleaving.

    Attributes:
        vision_model, vision_projection: None but on the first stage.
        language_model: its part of the decoder.
        share_embeddings_and_output_weights, model_type: what Megatron asks of a chunk.
    """

    vision_model: Any
    vision_projection: Any

    def __init__(self, config: Any, pre_process: bool, post_process: bool, vp_stage: int | None = None) -> None:
        super().__init__(config=config)
        language, vision = config.language_transformer_config, config.vision_transformer_config
        self.pre_process, self.post_process, self.vp_stage = pre_process, post_process, vp_stage
        self.model_type = ModelType.encoder_or_decoder
        self.sequence_parallel_lm = language.sequence_parallel
        self.tp_comm_overlap_lm = language.tp_comm_overlap
        self.context_parallel_lm = language.context_parallel_size
        self.tensor_model_parallel_size_lm = language.tensor_model_parallel_size

        self.vision_model = self.vision_projection = None
        self.language_model = language.build(pre_process, post_process, vp_stage)
        self.share_embeddings_and_output_weights = self.language_model.share_embeddings_and_output_weights
        self.max_sequence_length = self.language_model.max_sequence_length
        if pre_process:
            self.vision_model = vision.configure_model()
            self.vision_projection = config.vision_projection_config.configure_model()
        for module, frozen in (
            (self.language_model, config.freeze_language_model),
            (self.vision_model, config.freeze_vision_model),
            (self.vision_projection, config.freeze_vision_projection),
        ):
            if frozen and module is not None:
                module.requires_grad_(False)

        self.tile_tokens = vision.num_image_embeddings_per_tile
        if config.drop_vision_class_token:
            self.tile_tokens -= vision.class_token_len

    def shared_embedding_or_output_weight(self) -> Any:
        """The word embedding, where Megatron adds up its gradients of the first and the last stage."""
        return self.language_model.shared_embedding_or_output_weight()

    @property
    def shard_factor(self) -> int:
        """What a length is a multiple of, so that all ranks have the same share of a sequence."""
        tensor_ranks = self.tensor_model_parallel_size_lm if self.sequence_parallel_lm else 1
        context_ranks = self.context_parallel_lm
        return tensor_ranks * (2 * context_ranks if context_ranks > 1 else 1)

    def context_shard(self, tensor: Tensor, dimension: int) -> Tensor:
        """This context-parallel rank's part of a whole sequence along ``dimension``, as ``local_positions`` says. An
        index would be kept for the backward pass."""
        from megatron.core import parallel_state as ps

        ranks = self.context_parallel_lm
        if ranks == 1:
            return tensor
        first, size = ps.get_context_parallel_rank(), tensor.shape[dimension] // (2 * ranks)
        return torch.cat([tensor.narrow(dimension, n * size, size) for n in (first, 2 * ranks - 1 - first)], dimension)

    def shard(self, hidden_states: Tensor) -> Tensor:
        """This rank's part of a whole sequence ``[S, B, d]``."""
        hidden_states = self.context_shard(hidden_states, 0)
        if not self.sequence_parallel_lm:
            return hidden_states
        sharded: Tensor = tensor_parallel.scatter_to_sequence_parallel_region(hidden_states)
        return sharded


def unwrapped(chunk: Any) -> nn.Module:
    """The chunk inside what wraps it: Megatron's and torch's wrappers keep it as ``module``."""
    while hasattr(chunk, "module"):
        chunk = chunk.module
    assert isinstance(chunk, torch.nn.Module)
    return chunk
