"""``nemo-pre export``: a Hugging Face directory out of a checkpoint of any layout.

A plain or PRe-trained model becomes a LLaVA, with native resolution a Qwen2.5-VL, that ``transformers`` loads without
further code. One trained with mixed attention or positions in two dimensions, without an encoder, or with AIMv2 at
native resolution, needs them at inference too, and takes the code of ``remote_code/`` with it.
What only training needed stays behind. One output file's tensors are in memory at a time, and the directory appears
under its name when it is complete.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from nemo_pre.config.schema import ModelConfig
from nemo_pre.huggingface.atomic import appearing, refuse_existing
from nemo_pre.huggingface.progress import bytes_progress
from nemo_pre.options import PathText, Rule

if TYPE_CHECKING:
    import torch

    from nemo_pre.huggingface.distributed_checkpoint import CheckpointReader
    from nemo_pre.huggingface.safetensors_files import Group
    from nemo_pre.huggingface.weights import Weight

# The oldest release that the files are for. One after 4.57.2 and before 5 would make transformers 4.57 take any large
# vocabulary (Qwen2.5's) for an old Mistral's, and advise a flag that changes the ids.
WRITTEN_FOR = "4.57.0"
DTYPES = ("auto", "float32", "bfloat16", "float16")


def export_checkpoint(
    checkpoint: PathText, out: PathText, dtype: str = "auto", max_file_gb: Annotated[float, Rule(least=0.001)] = 4.0
) -> Path:
    """Write a Hugging Face directory from a checkpoint.

      nemo-pre export runs/NAME/checkpoints OUT                  the newest of a run
      nemo-pre export runs/NAME/checkpoints/step=800 OUT

    dtype is auto (as stored), float32, bfloat16 or float16; files are at most max_file_gb, which with the largest
    tensor is the memory it takes.
    """
    from nemo_pre.huggingface.architecture import hf_config
    from nemo_pre.huggingface.card import write_card
    from nemo_pre.huggingface.distributed_checkpoint import CheckpointReader
    from nemo_pre.huggingface.processor import write_processor
    from nemo_pre.huggingface.safetensors_files import plan_files, write_files
    from nemo_pre.launch.environment import prepare_environment

    prepare_environment("cpu")  # reading a checkpoint imports Megatron
    if dtype not in DTYPES:
        raise ValueError(f"dtype={dtype} is unknown: choose one of {', '.join(DTYPES)}.")
    target = Path(out)
    refuse_existing(target)
    source = complete_checkpoint(checkpoint)
    saved, model = _described(source)
    reader = CheckpointReader(source)
    weights = reader.check(model)
    with appearing(target) as unfinished:
        tokens = write_processor(saved, model, source, unfinished)
        stored = dtype if dtype != "auto" else _stored_dtype(weights, reader)
        values = hf_config(model, tokens.image, saved.data.sequence_length, stored, tokens.markers)
        groups = list(exported_groups(weights, model, reader, tokens.image, dtype))
        total = sum(sum(group.sizes.values()) for group in groups)
        progress = bytes_progress(f"exporting to {target}", total)
        write_files(unfinished, plan_files(groups, round(max_file_gb * 1e9)), progress)
        write_config(unfinished, values)
        write_card(unfinished, saved, model, source)
    print(f"{target}: {total / 1e9:.3g} GB")
    return target


def complete_checkpoint(path: str, option: str = "checkpoint") -> Path:
    """A checkpoint by itself, or the newest of a run's directory; its weights are those that were saved.

    Args:
        option: of the command line, which named it.

    Raises:
        ValueError: it is neither, has no configuration that can be read, is damaged, or would run code.
    """
    from nemo_pre.run_files.checkpoints import former_stage
    from nemo_pre.run_files.saved_config import read_saved

    directory = Path(path)
    if (directory / "checkpoints").is_dir():
        directory = directory / "checkpoints"
    found = Path(former_stage(str(directory), option))
    read_saved(found)  # refused before NeMo is imported, which takes ten seconds
    import nemo_pre.launch.preload  # noqa: F401  # imports NeMo without its messages
    from nemo_pre.checkpoint_files.inspection import damage_or_danger
    from nemo_pre.checkpoint_files.metadata import weights_only
    from nemo_pre.launch.environment import external_job

    os.environ.update(external_job(os.environ) or {})  # its ranks read a share each
    return Path(former_stage(str(directory), option, partial(damage_or_danger, wanted=weights_only)))


def _described(source: Path) -> tuple[Any, ModelConfig]:
    from nemo_pre.run_files.saved_config import read_saved, saved_model

    return read_saved(source), saved_model(source)


def exported_groups(
    weights: list[Weight], model: ModelConfig, reader: CheckpointReader, image_token_id: int, dtype: str
) -> Iterator[Group]:
    """The exported tensors, those of one checkpoint tensor together."""
    from nemo_pre.config.vision_families import is_native
    from nemo_pre.huggingface.architecture import exported_vocab_size
    from nemo_pre.huggingface.qwen_vl import qwen_vl_name
    from nemo_pre.huggingface.safetensors_files import Group

    named = qwen_vl_name if is_native(model.vision) else str
    found = reader.tensors()
    extra_rows = exported_vocab_size(model.language, image_token_id) - model.language.vocab_size
    for weight in weights:
        target = _dtype(dtype, found[weight.key][1])
        rows = extra_rows if weight.key.endswith(("word_embeddings.weight", "output_layer.weight")) else 0
        sizes = {
            named(name): math.prod((shape[0] + rows, *shape[1:])) * target.itemsize
            for name, shape in weight.parts.items()
        }
        yield Group(sizes, partial(_make, weight, list(sizes), reader, target, rows))


def _make(
    weight: Weight, names: list[str], reader: CheckpointReader, dtype: torch.dtype, extra_rows: int
) -> dict[str, torch.Tensor]:
    """``extra_rows`` of zeros below an embedding are for ids that no text has."""
    import torch

    parts = [part.to(dtype) for part in weight.cut(reader.read(weight.key, weight.layer))]
    if extra_rows:
        parts = [torch.cat([part, part.new_zeros(extra_rows, *part.shape[1:])]) for part in parts]
    # A view of a larger tensor would be written with all of it.
    return {name: part.contiguous().clone() for name, part in zip(names, parts, strict=True)}


def _dtype(name: str, stored: torch.dtype) -> torch.dtype:
    import torch

    return stored if name == "auto" else getattr(torch, name)


def _stored_dtype(weights: list[Weight], reader: CheckpointReader) -> str:
    """The dtype of the decoder's weights in the checkpoint."""
    from nemo_pre.huggingface.weights import LAYERS

    found = reader.tensors()
    return next(str(found[weight.key][1]) for weight in weights if weight.key.startswith(LAYERS)).removeprefix(
        "torch."
    )


def write_config(directory: Path, values: dict[str, Any]) -> None:
    """``config.json`` and, where the model needs it, the code beside it."""
    values = {**values, "transformers_version": WRITTEN_FOR}
    (directory / "config.json").write_text(json.dumps(values, indent=2, sort_keys=True) + "\n")
    if "auto_map" in values:
        copy_own_code(values["model_type"], directory)


def copy_own_code(model_type: str, directory: Path) -> None:
    """The files that a model of this type is loaded with."""
    from nemo_pre.huggingface.loading import own_files

    for name, file in own_files(model_type).items():
        shutil.copyfile(file, directory / name)
