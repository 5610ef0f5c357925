"""The Lightning module around a chunk of the model."""

from __future__ import annotations

from typing import Any

from nemo.collections.vlm.neva.model.base import NevaModel

from nemo_pre.neva.chunk import unwrapped
from nemo_pre.neva.model import VisualNevaConfig
from nemo_pre.parallel.micro_batch import forward_arguments, load_micro_batch


class VisualNevaModel(NevaModel):
    """NeMo's module of NeVA, around a chunk of ours."""

    config: VisualNevaConfig

    def configure_model(self, vp_stage: int | None = None) -> None:
        if not hasattr(self, "module"):
            self.module = self.config.configure_model(vp_stage=vp_stage)

    def reinit(self) -> VisualNevaModel:
        """Another chunk for a further virtual pipeline stage, sharing this one's config.

        NeMo rebuilds chunks from captured constructor arguments otherwise, and would lose what callbacks and
        the strategy have set on the config since.
        """
        return type(self)(config=self.config, optim=self.optim, tokenizer=self.tokenizer)

    def forward(self, **batch: Any) -> Any:
        return self.module(**batch)

    def data_step(self, dataloader_iter: Any) -> dict[str, Any]:
        chunk: Any = unwrapped(self.module)
        return load_micro_batch(dataloader_iter, chunk.pre_process, chunk.post_process)

    def forward_step(self, batch: dict[str, Any]) -> Any:
        return self(**forward_arguments(batch))
