"""The run's configuration in its directory, from its first step on."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

from lightning.pytorch.callbacks import Callback

from nemo_pre.config.compose import save_resolved
from nemo_pre.config.run import RunConfig
from nemo_pre.run_files.saved_config import FILE

log = logging.getLogger(__name__)


class RunRecord(Callback):
    """Writes ``output_dir/config.yaml`` when a step was trained with it: a start that trains nothing, for whatever
    reason, leaves there what it found."""

    def __init__(self, config: RunConfig) -> None:
        self._config = config
        self._written = False

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        if not trainer.is_global_zero or self._written:
            return
        path = Path(self._config.output_dir) / FILE
        try:
            beside = path.with_suffix(".tmp")
            save_resolved(self._config, beside)
            os.replace(beside, path)  # so that a full disk does not cost the former one
        except OSError as error:
            log.warning("%s is not written: %s. Training goes on; checkpoints have one of their own.", path, error)
        self._written = True
