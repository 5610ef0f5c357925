"""Exported directories, and others of Hugging Face, as ``transformers`` loads them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from nemo_pre.huggingface.config_fields import listed, read_json


def load_network(directory: Path, **how: Any) -> Any:
    """A directory's model, with every weight from its files.

    Args:
        how: options of ``AutoModelForImageTextToText.from_pretrained``.

    Raises:
        ValueError: a weight is missing or of another shape, which ``transformers`` would draw at random; or the
            directory is of a newer ``transformers``, whose rotary positions this one passes over.
    """
    import transformers

    newer = _has_field(read_json(directory / "config.json"), "rope_parameters")
    if newer and int(transformers.__version__.split(".")[0]) < 5:
        raise ValueError(
            f"config.json has rope_parameters, which transformers {transformers.__version__} does not read: import it "
            f"with nemo-pre import, and ask the checkpoint."
        )
    network, report = transformers.AutoModelForImageTextToText.from_pretrained(
        directory, output_loading_info=True, **how
    )
    missing = sorted({*report["missing_keys"], *(key for key, *_ in report["mismatched_keys"])})
    if missing:
        raise ValueError(f"its files have no weights that fit {listed(missing)}: name a directory that is whole.")
    return network


def _has_field(values: Any, name: str) -> bool:
    if not isinstance(values, dict):
        return False
    return values.get(name) is not None or any(_has_field(part, name) for part in values.values())


def load_processor(directory: Path, **how: Any) -> Any:
    """A directory's processor with the pixels and token ids of training.

    Slow image processors resize as PIL does, and so does training. The tokenizer is the fast one, as in training; a
    directory may lack the slow one's files.

    Args:
        how: options of ``AutoProcessor.from_pretrained``.
    """
    from transformers import AutoImageProcessor, AutoProcessor

    processor = AutoProcessor.from_pretrained(directory, use_fast=True, **how)
    processor.image_processor = AutoImageProcessor.from_pretrained(directory, use_fast=False, **how)
    if processor.tokenizer.pad_token is None:
        processor.tokenizer.pad_token = processor.tokenizer.eos_token
    return processor
