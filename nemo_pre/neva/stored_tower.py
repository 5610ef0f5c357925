"""What stands in an encoder's place while its outputs are read from ``data.features``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn


class StoredTower(nn.Module):
    """Nothing in memory, and the encoder's weights in every checkpoint.

    So a checkpoint is complete: it is exported, asked, diagnosed and trained further like any other. The weights come
    from the file beside the features, which :func:`nemo_pre.features.check.check_features` has compared with those the
    run starts with; what a checkpoint holds of them is therefore not taken over.

    Args:
        path: safetensors, by name within the tower.
    """

    def __init__(self, path: str | Path) -> None:
        super().__init__()
        self.path = path

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: Any = (), metadata: Any = None) -> dict[str, Any]:
        """Mapped from the file, privately: what is read into the tensors when a checkpoint is loaded stays there."""
        from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
        from safetensors.torch import load_file

        return make_sharded_tensors_for_checkpoint(load_file(self.path), prefix, {}, sharded_offsets)

    def _load_from_state_dict(self, *_: Any) -> None:
        """Load nothing: the tower's weights were compared, and there is nothing to fill."""
