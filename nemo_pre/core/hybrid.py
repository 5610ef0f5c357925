"""A ``HybridModel`` of Megatron-Core, which is to replace ``GPTModel``, as the decoder of our own chunks."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from torch import nn

from nemo_pre.compat import versions
from nemo_pre.neva.decoder import DecoderConfig
from nemo_pre.neva.model import VisualNevaConfig


@dataclass
class HybridDecoderConfig(DecoderConfig):
    """The configuration of a decoder whose layers a pattern names; ``num_layers`` counts the pattern's letters.

    Attributes:
        hybrid_stack_spec: Megatron's specification of each kind of layer.
        hybrid_layer_pattern: Megatron's: ``*`` attention, ``-`` MLP, ``M`` Mamba, ``|`` between pipeline stages.
    """

    hybrid_stack_spec: Any = None
    hybrid_layer_pattern: str = ""

    def build(self, pre_process: bool, post_process: bool, vp_stage: int | None) -> nn.Module:
        from megatron.core.models.hybrid.hybrid_model import HybridModel

        return HybridModel(
            self,
            self.hybrid_stack_spec,
            hybrid_layer_pattern=self.hybrid_layer_pattern,
            pre_process=pre_process,
            post_process=post_process,
            vp_stage=vp_stage,
            **self.of_every_stage(),
        )


def with_hybrid_decoder(config: VisualNevaConfig, stack_spec: Any, pattern: str) -> VisualNevaConfig:
    """Give a model's configuration a ``HybridModel`` as decoder, of the widths it has; changed in place and returned.

    Args:
        config: of :func:`nemo_pre.core.model.model_config`.
        stack_spec: Megatron's ``ModuleSpec`` of a ``HybridStack``.
        pattern: its layers, with ``|`` between the chunks of pipeline stages.

    Raises:
        ValueError: this Megatron-Core has no ``HybridModel``.
    """
    try:
        import megatron.core.models.hybrid.hybrid_model  # noqa: F401
    except ImportError:
        raise ValueError(
            f"megatron-core {versions.installed('megatron-core')} has no HybridModel: install 0.19 (the extra core)."
        ) from None
    former = config.language_transformer_config
    decoder = HybridDecoderConfig.__new__(HybridDecoderConfig)
    for field in fields(former):  # as they are: another check would compare what pipelining has set since
        setattr(decoder, field.name, getattr(former, field.name))
    decoder.num_layers = len(pattern.replace("|", "").split("/")[0])
    decoder.hybrid_stack_spec, decoder.hybrid_layer_pattern = stack_spec, pattern
    config.language_transformer_config = decoder
    return config
