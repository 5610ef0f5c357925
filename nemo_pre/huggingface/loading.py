"""Exported directories, and others of Hugging Face, as ``transformers`` loads them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

# How the model card says it, with the name ``directory`` for the exported one; load_processor does the same.
SNIPPET = """\
processor = AutoProcessor.from_pretrained(directory, use_fast=True)  # the tokenizer of training
processor.image_processor = AutoImageProcessor.from_pretrained(directory, use_fast=False)  # resizes as in training"""


def load_processor(directory: Path, **how: Any) -> Any:
    """A directory's processor with the pixels and token ids of training.

    Slow image processors resize as PIL does, and so does training. The tokenizer is the fast one, as in training; a
    directory may lack the slow one's files.

    Args:
        how: options of ``AutoProcessor.from_pretrained``.
    """
    from transformers import AutoImageProcessor, AutoProcessor

    how = {"trust_remote_code": False, **how}  # None asks at the terminal, and waits
    # Where it is None, transformers advises other ids for every large vocabulary.
    processor = AutoProcessor.from_pretrained(directory, use_fast=True, fix_mistral_regex=False, **how)
    processor.image_processor = AutoImageProcessor.from_pretrained(directory, use_fast=False, **how)
    if processor.tokenizer.pad_token is None:
        processor.tokenizer.pad_token = processor.tokenizer.eos_token
    return processor


def own_files(model_type: str) -> dict[str, Path]:
    """The files of ``remote_code/`` that a model of this type is loaded with, by name; none for others' types."""
    from nemo_pre.huggingface import remote_code
    from nemo_pre.huggingface.architecture import SPATIAL
    from nemo_pre.huggingface.qwen_vl import SPATIAL_QWEN_VL

    others = {SPATIAL: ("spatial_tokens.py",), SPATIAL_QWEN_VL: ("spatial_tokens.py", "native_aimv2.py")}
    if model_type not in others:
        return {}
    code = Path(remote_code.__file__).parent
    names = (f"configuration_{model_type}.py", f"modeling_{model_type}.py", *others[model_type])
    return {name: code / name for name in names}


def needs_own_code(directory: Path) -> bool:
    """Whether a directory's model is one of ours that needs the code beside it; other people's code is never run.

    Raises:
        ValueError: the code beside it is not what this version exports.
    """
    values = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    if "auto_map" not in values:
        return False
    files = own_files(str(values.get("model_type")))
    if not files:
        return False  # transformers' own class is taken, and where it has none it refuses
    wanted = {entry.split("--")[-1].split(".")[0] + ".py" for entry in values["auto_map"].values()}
    found = {path.name for path in directory.glob("*.py")}
    for name in sorted(wanted | (found & set(files))):
        if name not in files or (directory / name).read_bytes() != files[name].read_bytes():
            raise ValueError(
                f"{directory / name} is not the code that this version exports, and no other is run: export the model "
                f"again."
            )
    if any("--" in entry for entry in values["auto_map"].values()):
        raise ValueError(f"{directory / 'config.json'} names code of another repository, which is not run.")
    return True
