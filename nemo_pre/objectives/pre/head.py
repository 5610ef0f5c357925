"""PRe's prediction heads: what the model gets of them before it is built."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from nemo_pre.objectives.pre import PReConfig
from nemo_pre.options import choices_of
from nemo_pre.parallel.replicated import sum_gradients_over_tensor_parallel
from nemo_pre.parallel.seeding import seeded
from nemo_pre.terms.float32 import Float32LayerNorm, Float32Linear
from nemo_pre.terms.training import VisualChunk

ACTIVATIONS = {"gelu": nn.GELU, "relu": nn.ReLU, "silu": nn.SiLU}
assert tuple(ACTIVATIONS) == choices_of(PReConfig, "head_activation")


@dataclass(frozen=True)
class PredictionHeadSpec:
    """Shape of PRe's prediction heads, one per target layer (1-based).

    Source: "2-layer MLP" (arXiv 2603.20808); its width is not published. See PReConfig for the defaults.
    """

    layers: tuple[int, ...]
    input_width: int
    hidden_width: int
    output_width: int
    activation: str
    norm: bool
    seed: int

    def build(self, layer: int) -> PredictionHead:
        """The head of one layer, with weights that depend on the seed and the layer alone."""
        with seeded(self.seed, f"pre_heads.{layer}"):
            return PredictionHead(self)

    def parts(self) -> dict[str, nn.Module | Tensor]:
        return {f"pre_heads.{layer}": self.build(layer) for layer in self.layers}

    def add_to(self, chunk: VisualChunk) -> None:
        heads = {str(number): self.build(number) for number in self.layers if chunk.decoder_layer(number) is not None}
        if heads:
            chunk.pre_heads = nn.ModuleDict(heads)  # type: ignore[attr-defined]
            if chunk.config.sequence_parallel:
                sum_gradients_over_tensor_parallel(chunk.pre_heads)  # type: ignore[attr-defined]


class PredictionHead(nn.Module):
    """``fc2(activation(fc1(norm(x))))`` on ``[n, input_width]``, in float32; replicated over tensor-parallel ranks."""

    def __init__(self, spec: PredictionHeadSpec) -> None:
        super().__init__()
        self.norm = Float32LayerNorm(spec.input_width) if spec.norm else None
        self.fc1 = Float32Linear(spec.input_width, spec.hidden_width)
        self.activation = ACTIVATIONS[spec.activation]()
        self.fc2 = Float32Linear(spec.hidden_width, spec.output_width)

    def forward(self, visual_tokens: Tensor) -> Tensor:
        hidden = visual_tokens if self.norm is None else self.norm(visual_tokens)
        return self.fc2(self.activation(self.fc1(hidden)))


@dataclass(frozen=True)
class AveragedProjector:
    """A moving average of the projector beside it on the first stage: PRe's moving anchor.

    Attributes:
        projection: the projector's configuration.
    """

    projection: object

    def parts(self) -> dict[str, nn.Module | Tensor]:
        return {"ema_projection": self.projection.configure_model()}  # type: ignore[attr-defined]

    def add_to(self, chunk: VisualChunk) -> None:
        if chunk.pre_process:
            average: nn.Module = self.projection.configure_model().requires_grad_(False)  # type: ignore[attr-defined]
            average.load_state_dict(chunk.vision_projection.state_dict())
            chunk.ema_projection = average  # type: ignore[attr-defined]
