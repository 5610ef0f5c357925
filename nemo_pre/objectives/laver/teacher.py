"""LaVer's teacher: a moving average of a chunk's decoder layers and, on the last stage, of the visual head.

The average is float32 and sharded over the data-parallel ranks (:mod:`nemo_pre.parallel.sharded_average`); what the
forward pass computes with is a copy of it in the parameters' dtype, either kept (``resident``: 2 bytes per parameter
in bf16) or gathered layer by layer into one buffer just before use (``gathered``: the largest layer's size, and an
all-gather per layer and micro-batch). A kept copy is gathered anew after every update, while the next step begins: a
layer waits for its own weights only.

The teacher has modules of its own, so neither random state nor FP8 history of the student changes, and no parameter
of it requires a gradient, so neither Megatron's gradient buffers nor the optimizer know of it.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.transformer.transformer_block import TransformerBlock
from torch import Tensor, nn

from nemo_pre.parallel.sharded_average import ShardedAverage, move_averages


@dataclass
class _Unit:
    """A module that is averaged and gathered as one: a layer, the final norm, the head.

    Attributes:
        flat: what the module's parameters are views of; one buffer for all units where they are gathered before use.
        under_way: the gather of ``flat`` that nobody has waited for yet.
    """

    module: nn.Module
    student: nn.Module
    average: ShardedAverage
    flat: Tensor
    under_way: dist.Work | None = None

    @property
    def parameters(self) -> list[nn.Parameter]:
        return list(self.module.parameters())

    def start_gather(self) -> None:
        self.wait()
        self.under_way = self.average.start_gather(self.flat[: self.average.padded])

    def wait(self) -> None:
        """Let what is computed from now on find the weights: on a GPU the stream waits, not the host."""
        if self.under_way is not None:
            self.under_way.wait()
            self.under_way = None


class Teacher(nn.Module):
    """A chunk's part of the teacher.

    Args:
        language_model: the student's chunk of the language model (Megatron's ``GPTModel``).
        head: a visual head of the teacher's own, on the last stage; None elsewhere.
        memory: ``resident`` or ``gathered``.
    """

    def __init__(self, language_model: Any, head: nn.Module | None, memory: str) -> None:
        super().__init__()
        self.memory = memory
        config = copy.copy(language_model.config)
        # Transformer Engine would keep FP8 copies of all layers' weights.
        config.disable_parameter_transpose_cache |= memory == "gathered"
        config.perform_initialization = False  # the student's values come; no random number may be drawn for it
        self.decoder = TransformerBlock(
            config=config,
            spec=language_model.transformer_layer_spec,
            pre_process=language_model.pre_process,
            post_process=language_model.post_process,
            pg_collection=language_model.pg_collection,
            vp_stage=language_model.vp_stage,
        )
        self.head = head
        # Of the teacher's logits, for centring; a plain attribute, or bf16 training would round it.
        width = language_model.config.hidden_size
        self.center = torch.zeros(width, dtype=torch.float32) if head is not None else None
        self.requires_grad_(False)
        self._units: list[_Unit] = []
        self.register_load_state_dict_pre_hook(self._take_over)
        self.train(False)

    def train(self, mode: bool = True) -> Teacher:
        return super().train(False)

    @torch.no_grad()
    def forward(self, hidden_states: Tensor, structure: Tensor | None, rotary_pos_emb: Tensor | None) -> Tensor:
        """``hidden_states`` of the unmasked branch through this chunk's layers."""
        self.decoder.set_input_tensor(hidden_states)
        output = self.decoder(hidden_states=hidden_states, attention_mask=structure, rotary_pos_emb=rotary_pos_emb)
        self.decoder.set_input_tensor(None)  # or it would be kept until the next
        return output

    @torch.no_grad()
    def predict(self, visual_tokens: Tensor) -> Tensor:
        """Logits ``[n, k]`` of the visual head, on the last stage."""
        assert self.head is not None
        return self.head(visual_tokens)

    # --- the average ------------------------------------------------------------------------------------------------

    def install(self, language_model: Any, head: nn.Module | None, group: Any) -> None:
        """Start averaging, at the student's values. Once; a run that resumes reads its average back after this."""
        if self._units:
            return
        pairs = list(zip(self.decoder.layers, language_model.decoder.layers, strict=True))
        if self.decoder.final_layernorm is not None:
            pairs.append((self.decoder.final_layernorm, language_model.decoder.final_layernorm))
        if self.head is not None:
            assert head is not None and self.center is not None
            pairs.append((self.head, head))
            self.center = self.center.to(next(head.parameters()).device)
        averages = [ShardedAverage(list(student.parameters()), group) for _, student in pairs]
        dtype = next(self.parameters()).dtype
        resident = self.memory == "resident"
        shared = averages[0].shard.new_empty(0 if resident else max(a.padded for a in averages), dtype=dtype)
        for (module, student), average in zip(pairs, averages, strict=True):
            flat = average.shard.new_empty(average.padded, dtype=dtype) if resident else shared
            self._units.append(_Unit(module, student, average, flat))
            for parameter, value in zip(module.parameters(), average.split(flat), strict=True):
                assert parameter.dtype == dtype, "the teacher's parameters have one dtype"
                parameter.data = value
            module.register_forward_pre_hook(_before_use(self._units[-1], gathers=not resident))
        self._refresh()

    def update(self, momentum: float) -> None:
        """One step of the average towards the student, and the working copy after it."""
        self.wait()
        move_averages([(unit.average, list(unit.student.parameters())) for unit in self._units], momentum)
        self._refresh()

    def wait(self) -> None:
        """Wait for the gathered weights: until then a parameter may be half old and half new. A forward pass waits by
        itself."""
        for unit in self._units:
            unit.wait()

    def _refresh(self) -> None:
        if self.memory == "resident":
            for unit in self._units:
                unit.start_gather()

    # --- checkpoints ------------------------------------------------------------------------------------------------

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> dict[str, Any]:
        """The average in float32 under the teacher's own names, cut over tensor and pipeline ranks as the student is.

        Each layer is gathered into host memory in turn: 4 bytes per parameter of this rank's part of the model.
        Before :meth:`install`, when a stage takes over a former one's weights, it asks for nothing: a stage's teacher
        starts as its student, and a former stage without LaVer has none.
        """
        if not self._units:
            return {}
        from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint, sharded_state_dict_default

        state = self.decoder.sharded_state_dict(f"{prefix}decoder.", sharded_offsets, metadata)
        if self.head is not None:
            state |= sharded_state_dict_default(self.head, f"{prefix}head.", sharded_offsets, metadata)
            state |= make_sharded_tensors_for_checkpoint({"center": self.center}, prefix, {}, sharded_offsets)
        wide = {
            id(parameter): value
            for unit in self._units
            for parameter, value in zip(unit.parameters, _on_host(unit), strict=True)
        }
        for entry in state.values():
            if isinstance(entry, (ShardedTensor, ShardedTensorFactory)) and id(entry.data) in wide:
                entry.data = wide[id(entry.data)]
                if isinstance(entry, ShardedTensor):
                    entry.dtype = torch.float32
        return state

    def _take_over(self, module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
        """Keep a checkpoint's float32 values before PyTorch copies them into the working copy."""
        found = {name: state[prefix + name] for name, _ in self.named_parameters() if prefix + name in state}
        center = state.pop(f"{prefix}center", None)
        if center is not None and self.center is not None:
            self.center.copy_(center)
        if found:
            self._load(found)

    def _load(self, values: dict[str, Tensor]) -> None:
        self.wait()
        names = {id(parameter): name for name, parameter in self.named_parameters()}
        for unit in self._units:
            whole = unit.average.split(unit.average.gather(torch.float32))
            unit.average.load(
                [values.get(names[id(p)], old).to(old) for p, old in zip(unit.parameters, whole, strict=True)]
            )
        self._refresh()
        self.wait()  # PyTorch writes into the working copy next


def _on_host(unit: _Unit) -> list[Tensor]:
    return [value.cpu() for value in unit.average.split(unit.average.gather(torch.float32))]


def _before_use(unit: _Unit, gathers: bool) -> Any:
    def hook(*_: Any) -> None:
        if gathers:
            unit.start_gather()
        unit.wait()

    return hook
