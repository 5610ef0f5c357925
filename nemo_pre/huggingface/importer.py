"""``nemo-pre import``: a checkpoint to start runs from, out of Hugging Face directories.

Weights go over one by one, in the type they have; a 70B model needs no more memory than its largest tensor. The
checkpoint appears under its name when it is complete.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from nemo_pre.config.run import RunConfig
from nemo_pre.config.schema import ModelConfig
from nemo_pre.data.tokenizer import KEPT as ORIGINAL
from nemo_pre.huggingface.atomic import appearing
from nemo_pre.huggingface.progress import bytes_progress
from nemo_pre.options import Count, PathText, Seed

if TYPE_CHECKING:
    import torch

    from nemo_pre.huggingface.distributed_checkpoint import StoredTensor
    from nemo_pre.huggingface.pixels import Pixels
    from nemo_pre.huggingface.safetensors_files import TensorSource
    from nemo_pre.huggingface.weights import Weight

# Computed, not learned; and what no features come from: the parts of a whole CLIP or SigLIP beside its vision tower,
# and AIMv2's head.
IGNORED = (".rotary_emb.inv_freq", ".embeddings.position_ids")
OTHER_TOWER = ("text_model.", "logit_scale", "logit_bias", "text_projection.", "visual_projection.", "head.")


def import_checkpoint(
    llava: PathText | None = None,
    out: PathText | None = None,
    vision: PathText | None = None,
    language: PathText | None = None,
    feature_layer: int = -2,
    image_size: Count | None = None,
    seed: Seed = 1234,
    allow_pickle: bool = False,
    processor: PathText | None = None,
) -> Path:
    """Make a checkpoint that runs start from with init_from=OUT, and OUT/config.yaml with the model it holds.

      nemo-pre import LLAVA_DIR OUT                              a LLaVA (Llama or Qwen2; CLIP, SigLIP, DINOv2, AIMv2)
                                                                 or a Qwen2.5-VL
      nemo-pre import vision=DIR language=DIR out=OUT            a vision tower, a language model and a new projector
      nemo-pre import vision=patch_mlp language=DIR out=OUT      a new patch MLP (recipes/model/vision), no encoder

    Directories are local, with safetensors, and the tokenizer is beside the language model. feature_layer, image_size
    (to which the tower's position embeddings are resampled; null: its own) and seed (of the new projector) are for the
    second form; allow_pickle=true also reads pytorch_model*.bin. Pictures become the pixels of the image processor in
    LLAVA_DIR or vision=DIR; processor=PATH names a folder or JSON file that has one where these have none.
    """
    if out is None or (llava is None) == (vision is None) or (vision is None) != (language is None):
        raise ValueError("Give LLAVA_DIR OUT, or vision=DIR language=DIR out=OUT: see nemo-pre import --help.")
    if llava is not None and image_size is not None:
        raise ValueError("image_size is for vision=DIR language=DIR: a LLaVA keeps the resolution it was trained at.")
    from nemo_pre.checkpoint_files.metadata import WEIGHTS
    from nemo_pre.config.vision_families import is_native
    from nemo_pre.config.vision_towers import tower_problems
    from nemo_pre.data.tokenizer import check_size, load_tokenizer
    from nemo_pre.huggingface.architecture import is_recipe, read_parts, read_whole
    from nemo_pre.huggingface.distributed_checkpoint import write_weights
    from nemo_pre.huggingface.pixels import fit_tower, read_pixels, recipe_pixels
    from nemo_pre.launch.environment import prepare_environment
    from nemo_pre.run_files.checksums import record_checksums

    prepare_environment("cpu")
    target = Path(out)
    if llava is not None:
        model = read_whole(Path(llava))
        pixels = fit_tower(read_pixels(Path(llava), model.vision, processor), model.vision)
        tensors = list(_stored_whole(model, Path(llava), allow_pickle))
        original = Path(llava)
    else:
        assert vision is not None and language is not None
        model = read_parts(Path(vision), Path(language), target.name)
        if is_native(model.vision) and image_size is not None:
            raise ValueError(f"image_size is not for {vision}, whose tower takes images of any size: leave it out.")
        if model.vision.num_layers and model.vision.family != "qwen25_vl":
            model.vision.feature_layer = feature_layer
        new = is_recipe(Path(vision)) and processor is None
        own = recipe_pixels(vision) if new else read_pixels(Path(vision), model.vision, processor)
        pixels = fit_tower(own, model.vision, image_size, whole=False)
        for problem in tower_problems(model.vision):
            raise ValueError(problem)
        tensors = list(_stored_parts(model, Path(vision), Path(language), seed, allow_pickle))
        original = Path(language)
    check_size(load_tokenizer(original), model.language.vocab_size)
    total = sum(math.prod(tensor.shape) * tensor.dtype.itemsize for tensor in tensors)
    with appearing(target) as unfinished:
        write_weights(unfinished, tensors, bytes_progress(f"importing to {target}", total))
        _keep_other_files(original, unfinished / ORIGINAL)
        model.tokenizer = str(target / ORIGINAL)
        _describe(model, pixels, unfinished / "config.yaml", seed)
        record_checksums(unfinished, WEIGHTS)  # config.yaml is the user's to change
    print(f"{target}: {model.name}, {total / 1e9:.3g} GB; start a run from it with init_from={target}")
    return target


def _stored_whole(model: ModelConfig, directory: Path, allow_pickle: bool) -> Iterator[StoredTensor]:
    from nemo_pre.config.vision_families import is_native
    from nemo_pre.huggingface.qwen_vl import llava_name
    from nemo_pre.huggingface.safetensors_files import TensorSource
    from nemo_pre.huggingface.weights import HF_TOWER, hub_name, language_weights, projector_weights, tower_weight

    source = TensorSource(directory, allow_pickle)
    named = llava_name if is_native(model.vision) else hub_name
    names = {named(name): name for name in source.names() if not name.endswith(IGNORED)}
    towers = (tower_weight(n, source.describe(names[n])[0]) for n in names if n.startswith(HF_TOWER))
    weights = [*language_weights(model.language), *projector_weights(model), *towers]
    yield from _stored(weights, source, names, model)


def _stored_parts(
    model: ModelConfig, vision: Path, language: Path, seed: int, allow_pickle: bool
) -> Iterator[StoredTensor]:
    from nemo_pre.huggingface.safetensors_files import TensorSource
    from nemo_pre.huggingface.weights import HF_LANGUAGE, language_weights, projector_weights

    source = TensorSource(language, allow_pickle)
    names = {HF_LANGUAGE + name: name for name in source.names() if not name.endswith(IGNORED)}
    yield from _stored(list(language_weights(model.language)), source, names, model)
    yield from _stored_tower(model, vision, seed, allow_pickle)
    yield from _new_projector(list(projector_weights(model)), model, seed)


def _stored_tower(model: ModelConfig, vision: Path, seed: int, allow_pickle: bool) -> Iterator[StoredTensor]:
    from nemo_pre.huggingface.architecture import is_recipe
    from nemo_pre.huggingface.safetensors_files import TensorSource
    from nemo_pre.huggingface.weights import HF_TOWER, TOWER, resampled_positions, tower_weight
    from nemo_pre.neva.vision import VisionTowerConfig

    if is_recipe(vision):
        values = VisionTowerConfig(model.vision, seed).configure_model().state_dict()
        yield from (_new_tensor(TOWER + name, tensor) for name, tensor in values.items())
        return
    source = TensorSource(vision, allow_pickle)
    if model.vision.family == "qwen25_vl":
        yield from _stored_qwen_vl_tower(model, source)
        return
    own = [name for name in source.names() if not name.startswith(OTHER_TOWER) and not name.endswith(IGNORED)]
    names = {HF_TOWER + name: name for name in own}
    weights = [tower_weight(name, source.describe(names[name])[0]) for name in names]
    yield from _stored([resampled_positions(weight, model.vision) for weight in weights], source, names, model)


def _stored_qwen_vl_tower(model: ModelConfig, source: TensorSource) -> Iterator[StoredTensor]:
    """The tower's tensors, from its own files or those of a whole Qwen2.5-VL. The MLP of its merger stays behind: it
    was trained for another language model."""
    from nemo_pre.huggingface.qwen_vl import MERGER, llava_name
    from nemo_pre.huggingface.weights import HF_TOWER, tower_weight

    whole = any(llava_name(name).startswith(HF_TOWER) for name in source.names())
    found = {(llava_name(name) if whole else HF_TOWER + name): name for name in source.names()}
    names = {ours: name for ours, name in found.items() if ours.startswith(HF_TOWER) and MERGER not in name}
    weights = [tower_weight(name, source.describe(names[name])[0]) for name in names]
    yield from _stored(weights, source, names, model)


def _stored(
    weights: list[Weight], source: TensorSource, names: dict[str, str], model: ModelConfig
) -> Iterator[StoredTensor]:
    """Each weight as something to be written; every tensor of the source must have a place.

    Args:
        names: the source's own name of each tensor, by its name on the hub.
    """
    from nemo_pre.huggingface.distributed_checkpoint import StoredTensor

    unused = set(names)
    for weight in weights:
        dtypes = set()
        for name, shape in weight.parts.items():
            if name not in names:
                raise ValueError(f"{source.directory} has no tensor {name}, which its config.json asks for.")
            found, dtype = source.describe(names[name])
            if found != shape:
                raise ValueError(
                    f"{name} in {source.directory} has shape {list(found)} but its config.json makes it {list(shape)}."
                )
            dtypes.add(dtype)
        if len(dtypes) > 1:
            raise ValueError(f"{', '.join(weight.parts)} in {source.directory} have several types: make them one.")
        unused -= set(weight.parts)
        parts = [names[name] for name in weight.parts]
        read = partial(_read_and_join, source, parts, weight.join)
        layers = None if weight.layer is None else model.language.num_layers
        yield StoredTensor(weight.key, weight.layer, layers, weight.shape, dtypes.pop(), read)
    if model.language.tie_embeddings:  # a tied output layer may be stored all the same
        unused.discard("language_model.lm_head.weight")
    if unused:
        raise ValueError(f"{source.directory} has {sorted(unused)[0]}, which has no place in the model.")


def _read_and_join(source: TensorSource, names: list[str], join: Callable[..., torch.Tensor]) -> torch.Tensor:
    return join([source.read(name) for name in names])


def _new_projector(weights: list[Weight], model: ModelConfig, seed: int) -> Iterator[StoredTensor]:
    """The values that a run with this seed starts from."""
    import torch

    from nemo_pre.huggingface.weights import PROJECTOR
    from nemo_pre.neva.build import build_projector_config

    projector = build_projector_config(model, seed, on_gpu=False).configure_model()
    values = projector.state_dict()
    for weight in weights:
        tensor = values[weight.key.removeprefix(PROJECTOR)]
        assert tuple(tensor.shape) == weight.shape and tensor.dtype == torch.float32
        yield _new_tensor(weight.key, tensor)


def _new_tensor(key: str, tensor: torch.Tensor) -> StoredTensor:
    from nemo_pre.huggingface.distributed_checkpoint import StoredTensor

    return StoredTensor(key, None, None, tuple(tensor.shape), tensor.dtype, partial(_given, tensor))


def _given(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


def _keep_other_files(source: Path, target: Path) -> None:
    """Configuration, tokenizer, processor: everything beside the weights that is text."""
    target.mkdir()
    for path in sorted(source.iterdir()):
        if path.suffix in (".json", ".jinja", ".txt", ".model", ".md") and not path.name.endswith(".index.json"):
            shutil.copyfile(path, target / path.name)


def _describe(model: ModelConfig, pixels: Pixels, path: Path, seed: int) -> None:
    from nemo_pre.config.compose import save_resolved

    length = model.language.max_position_embeddings
    assert length is not None
    save_resolved(RunConfig(name=model.name, seed=seed, model=model, data=pixels.data(length)), path)
