"""Exported directories, and others of Hugging Face, as ``transformers`` loads them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

CONFIGS = ("config.json", "processor_config.json", "preprocessor_config.json", "tokenizer_config.json")


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


def runs_own_code(directory: Path, trusted: bool) -> bool:
    """Whether a directory's model or processor is loaded with Python files that lie in it: nemo-pre's own, as an
    export wrote them, or others where they are trusted.

    Raises:
        ValueError: there are others, and they are not trusted.
        OSError: a file cannot be read.
    """
    from nemo_pre.huggingface import remote_code

    classes: list[str] = []
    for name in CONFIGS:
        if (directory / name).is_file():
            found = json.loads((directory / name).read_text(encoding="utf-8")).get("auto_map", {})
            classes += [
                str(part) for value in found.values() for part in (value if isinstance(value, list) else [value])
            ]
    if not classes or trusted:
        return bool(classes)
    ours = Path(remote_code.__file__).parent
    modules = {f"{name.rpartition('.')[0].replace('.', '/')}.py" for name in classes if name != "None"}
    for name in sorted(modules | {path.name for path in directory.glob("*.py")}):
        same = name == Path(name).name and (ours / name).is_file() and (directory / name).is_file()
        if not same or (ours / name).read_bytes() != (directory / name).read_bytes():
            raise ValueError(
                f"model={directory} is loaded with code of its own ({name}), which nemo-pre export does not write: "
                f"look at it, and give trust_remote_code=true if you trust it."
            )
    return True
