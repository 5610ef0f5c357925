"""Exported directories, and others of Hugging Face, as ``transformers`` loads them."""

from __future__ import annotations

from pathlib import Path
from typing import Any


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
