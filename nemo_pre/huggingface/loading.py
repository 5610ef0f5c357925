"""Exported directories, and others of Hugging Face, as ``transformers`` loads them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from nemo_pre.huggingface.config_fields import listed, read_json

# How the model card says it, with the name ``directory`` for the exported one; load_processor does the same.
SNIPPET = """\
processor = AutoProcessor.from_pretrained(directory, use_fast=True)  # the tokenizer of training
processor.image_processor = AutoImageProcessor.from_pretrained(directory, use_fast=False)  # resizes as in training"""
CONFIGS = ("config.json", "processor_config.json", "preprocessor_config.json", "tokenizer_config.json")


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


def needs_own_code(directory: Path, trusted: bool = False) -> bool:
    """Whether a directory's model or processor is loaded with Python files that lie in it: those that an export wrote,
    or, where they are trusted, others. Where ``transformers`` has a class of its own, that is taken.

    Raises:
        ValueError: there are others, and they are not trusted.
        OSError: a file cannot be read.
    """
    found = {name: _own_classes(directory / name) for name in CONFIGS if (directory / name).is_file()}
    classes = [entry for entries in found.values() for entry in entries]
    if not classes or trusted:
        return bool(classes)
    values = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    ours = own_files(str(values.get("model_type")))
    if not ours:
        return False
    modules = {f"{name.rpartition('.')[0].replace('.', '/')}.py" for name in classes if name != "None"}
    for name in sorted(modules | {path.name for path in directory.glob("*.py")}):
        if name not in ours or (directory / name).read_bytes() != ours[name].read_bytes():
            raise ValueError(
                f"{directory} is loaded with code of its own ({name}), which is not what this version exports and is "
                f"not run: export the model again, or, where you trust that code, diagnose it with "
                f"trust_remote_code=true."
            )
    return True


def _own_classes(config: Path) -> list[str]:
    """The classes that a configuration takes from files beside it, or of a repository (``NAME--file.Class``)."""
    entries = json.loads(config.read_text(encoding="utf-8")).get("auto_map", {}).values()
    return [str(part) for entry in entries for part in (entry if isinstance(entry, list) else [entry])]
