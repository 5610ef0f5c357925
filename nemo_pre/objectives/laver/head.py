"""What LaVer adds to the model: a visual head, a mask token, and a teacher of every chunk's layers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nemo_pre.objectives.laver.teacher import Teacher
from nemo_pre.parallel.replicated import sum_gradients_over_tensor_parallel
from nemo_pre.parallel.seeding import seeded
from nemo_pre.terms.float32 import Float32Linear


@dataclass(frozen=True)
class ReconstructionHeadSpec:
    """Shape of LaVer's visual head V_psi: ``width -> hidden -> hidden -> width``.

    Source: "3-layer MLP" (arXiv 2512.06281); hidden width 2048, GELU, last layer without bias and Kaiming-normal
    weights are the released code's.
    """

    width: int
    hidden_width: int
    seed: int

    def build(self) -> ReconstructionHead:
        """The head, with weights that depend on the seed alone."""
        with seeded(self.seed, "laver_head"):
            return ReconstructionHead(self)


class ReconstructionHead(nn.Module):
    """``fc3(gelu(fc2(gelu(fc1(x)))))`` on ``[n, width]``, in float32; replicated over tensor-parallel ranks."""

    def __init__(self, spec: ReconstructionHeadSpec) -> None:
        super().__init__()
        self.fc1 = Float32Linear(spec.width, spec.hidden_width)
        self.fc2 = Float32Linear(spec.hidden_width, spec.hidden_width)
        self.fc3 = Float32Linear(spec.hidden_width, spec.width, bias=False)
        for layer in (self.fc1, self.fc2, self.fc3):
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)

    def forward(self, visual_tokens: Tensor) -> Tensor:
        return self.fc3(F.gelu(self.fc2(F.gelu(self.fc1(visual_tokens)))))


@dataclass(frozen=True)
class ReconstructionSpec:
    """What LaVer adds to the model.

    Attributes:
        head: the visual head on the last stage.
        mask_token_id: the row of the word embedding that stands for a masked token; None: a learnable vector.
        mask_token_std: standard deviation of that vector's initial values: as small as a word's embedding, since what
            a masked token says is that it says nothing.
        teacher_memory: see :class:`nemo_pre.objectives.laver.teacher.Teacher`.
    """

    head: ReconstructionHeadSpec
    mask_token_id: int | None
    mask_token_std: float
    teacher_memory: str

    def parts(self) -> dict[str, nn.Module | Tensor]:
        """The head, the mask token, and of the teacher its head and centre alone: the rest has the names and shapes of
        the decoder's layers."""
        parts: dict[str, nn.Module | Tensor] = {
            "laver_head": self.head.build(),
            "laver_teacher.head": self.head.build(),
            "laver_teacher.center": torch.empty(self.head.width),
        }
        if self.mask_token_id is None:
            parts["laver_mask_token"] = torch.empty(self.head.width)
        return parts

    def add_to(self, chunk: Any) -> None:
        if chunk.pre_process and self.mask_token_id is None:
            chunk.laver_mask_token = nn.Parameter(torch.zeros(self.head.width))
            with seeded(self.head.seed, "laver_mask_token"):
                nn.init.normal_(chunk.laver_mask_token, std=self.mask_token_std)
        if chunk.post_process:
            chunk.laver_head = self.head.build()
            if chunk.config.sequence_parallel:
                sum_gradients_over_tensor_parallel(chunk.laver_head)
        teacher_head = self.head.build() if chunk.post_process else None
        chunk.laver_teacher = Teacher(chunk.language_model, teacher_head, self.teacher_memory)
        chunk.run_beside_samples(MaskedBranch(chunk, self.mask_token_id))


class MaskedBranch:
    """How a chunk runs LaVer's second sequence."""

    def __init__(self, chunk: Any, mask_token_id: int | None) -> None:
        self._chunk, self._mask_token_id = chunk, mask_token_id

    def mask_token(self) -> Tensor:
        if self._mask_token_id is None:
            return self._chunk.laver_mask_token
        row = torch.full((1, 1), self._mask_token_id, device=torch.cuda.current_device())
        return self._chunk.language_model.embedding(input_ids=row, position_ids=None)[0, 0]

    def run_teacher(self, branch: Tensor, structure: Tensor | None, rotary: Tensor | None) -> Tensor:
        return self._chunk.laver_teacher(branch, structure, rotary)
