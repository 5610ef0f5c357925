"""What a rehearsed rank's process runs in the tests: the run's own code with one fault in it."""

from __future__ import annotations

from typing import Any

from nemo_pre.rehearsal.rank import rehearse


def tensor_on_the_host(order: Any, *others: Any) -> Any:
    """The rotary frequencies stay where they were made."""
    import torch

    from nemo_pre.neva.rotary import VisualRotaryEmbedding

    def forward(self: Any, positions_3BQ: Any, mrope_section: object = None) -> Any:
        position = positions_3BQ[self.axes.to(positions_3BQ.device)].permute(2, 1, 0).to(torch.float32)
        angles = position * self.inverse_frequency
        return torch.cat([angles, angles], dim=-1)[:, :, None]

    VisualRotaryEmbedding.forward = forward  # type: ignore[method-assign]
    return rehearse(order, *others)


def leak(order: Any, *others: Any) -> Any:
    """A tap keeps what it has seen."""
    from nemo_pre.terms.layer_term import LayerTerm

    visit, seen = LayerTerm._visit, []

    def keeping(self: Any, layer: int, micro_batch: Any, hidden_states: Any) -> Any:
        seen.append(hidden_states.detach())
        return visit(self, layer, micro_batch, hidden_states)

    LayerTerm._visit = keeping  # type: ignore[method-assign]
    return rehearse(order, *others)


def wrong_shape(order: Any, *others: Any) -> Any:
    """A tensor-parallel rank cuts its part of the sequence as if it were alone."""
    from nemo_pre.neva.chunk import VisionLanguageChunk

    assert callable(VisionLanguageChunk.shard)
    VisionLanguageChunk.shard = lambda self, hidden_states: hidden_states  # type: ignore[method-assign]
    return rehearse(order, *others)


def layer_kept_twice(order: Any, *others: Any) -> Any:
    """Every layer's output is kept a second time for the backward pass."""
    import torch
    from megatron.core.transformer.transformer_layer import TransformerLayer

    class Keep(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, tensor: Any) -> Any:
            ctx.save_for_backward(*(tensor.clone() for _ in range(8)))
            return tensor.view_as(tensor)

        @staticmethod
        def backward(ctx: Any, grad: Any) -> Any:
            return grad

    forward = TransformerLayer.forward

    def keeping(self: Any, *args: Any, **kwargs: Any) -> Any:
        hidden_states, context = forward(self, *args, **kwargs)
        return Keep.apply(hidden_states), context

    TransformerLayer.forward = keeping
    return rehearse(order, *others)


def message_order(order: Any, *others: Any) -> Any:
    """The second stage receives the anchor of a micro-batch before it has asked for the activations of the first."""
    from nemo_pre.parallel.anchor_exchange import AnchorExchange

    connect = AnchorExchange.connect

    def late(self: Any, device: Any) -> None:
        if self.stage:
            import torch

            torch.distributed.all_reduce(torch.zeros(1, device=device))
        connect(self, device)
        if not self.stage:
            import torch

            torch.distributed.all_reduce(torch.zeros(1, device=device))

    AnchorExchange.connect = late  # type: ignore[method-assign]
    return rehearse(order, *others)


def objects_without_answer(order: Any, *others: Any) -> Any:
    """The first stage leaves out a collective of objects that the second one enters."""
    import torch.distributed as dist

    from nemo_pre.parallel.anchor_exchange import AnchorExchange

    install = AnchorExchange.install.__func__  # type: ignore[attr-defined]

    def lonely(cls: Any, taps: int, device: Any) -> Any:
        exchange = install(cls, taps, device)
        if dist.get_rank():
            dist.all_gather_object([None] * dist.get_world_size(), "here")
        return exchange

    AnchorExchange.install = classmethod(lonely)  # type: ignore[method-assign]
    return rehearse(order, *others)
