"""NeMo's own way in and out; importing this module registers it.

io.import_ckpt(model, "hf://DIRECTORY", output_path=OUT)        model: a VisualNevaModel
VisualNevaModel.exporter("hf", CHECKPOINT)(OUT)
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from nemo.lightning import io

from nemo_pre.huggingface.exporter import export_checkpoint
from nemo_pre.huggingface.importer import import_checkpoint
from nemo_pre.nemo.module import VisualNevaModel


@io.model_importer(VisualNevaModel, "hf")
class HuggingFaceImporter(io.ModelConnector["LlavaForConditionalGeneration", VisualNevaModel]):  # type: ignore # noqa: F821
    def init(self) -> VisualNevaModel:
        """The model, without weights."""
        from nemo_pre.config.untrained import untrained_run
        from nemo_pre.huggingface.architecture import read_whole
        from nemo_pre.huggingface.pixels import fit_tower, read_pixels
        from nemo_pre.neva.build import build_neva_config

        model = read_whole(Path(self))
        fit_tower(read_pixels(Path(self), model.vision), model.vision)
        run = untrained_run(model, tempfile.gettempdir())
        return VisualNevaModel(build_neva_config(run, on_gpu=False))

    def apply(self, output_path: Path) -> Path:
        return import_checkpoint(str(self), str(output_path))


@io.model_exporter(VisualNevaModel, "hf")
class HuggingFaceExporter(io.ModelConnector[VisualNevaModel, "LlavaForConditionalGeneration"]):  # type: ignore # noqa: F821
    def apply(self, output_path: Path) -> Path:
        return export_checkpoint(str(self), str(output_path))
