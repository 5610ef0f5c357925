"""``nemo-pre import``: a checkpoint to start runs from, out of Hugging Face directories.

Weights go over one by one, in the type they have; a 70B model needs no more memory than its largest tensor. The
checkpoint appears under its name when it is complete.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from nemo_pre.config.run import RunConfig
from nemo_pre.config.schema import ModelConfig, VisionConfig
from nemo_pre.data.tokenizer import KEPT as ORIGINAL
from nemo_pre.huggingface.atomic import appearing
from nemo_pre.huggingface.config_fields import listed
from nemo_pre.huggingface.own_files import own_file
from nemo_pre.huggingface.progress import bytes_progress
from nemo_pre.options import Count, PathText, Seed

if TYPE_CHECKING:
    import torch

    from nemo_pre.huggingface.distributed_checkpoint import StoredTensor
    from nemo_pre.huggingface.pixels import Pixels
    from nemo_pre.huggingface.safetensors_files import TensorSource
    from nemo_pre.huggingface.weights import Weight

# What files may hold beside a model's weights, and why it does not matter.
COMPUTED = ("rotary_emb.inv_freq", "rotary_pos_emb.inv_freq", "embeddings.position_ids")  # by every model that loads
OTHER_HALF = (
    "text_model.",
    "logit_scale",
    "logit_bias",
    "text_projection.",
    "visual_projection.",
)  # of a CLIP, SigLIP
AIMV2, AIMV2_HEAD = ("aimv2", "aimv2_native"), "head."  # no features come from it


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
      nemo-pre import vision=DIR language=DIR out=OUT            a vision tower, a language model and a new projector;
                                                                 the former also out of a CLIP, SigLIP, LLaVA or
                                                                 Qwen2.5-VL
      nemo-pre import vision=patch_mlp language=DIR out=OUT      a new patch MLP (recipes/model/vision), no encoder

    Directories are local, with safetensors, and the tokenizer is beside the language model; what is missing there, or
    has no place in the model, is refused. feature_layer, image_size (to which the tower's position embeddings are
    resampled; null: its own) and seed (of the new projector) are for the second form; allow_pickle=true also reads
    pytorch_model*.bin. Pictures become the pixels of the image processor in LLAVA_DIR or vision=DIR; processor=PATH
    names a folder or JSON file that has one where these have none.
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

    if out.rstrip("/").endswith(".ckpt"):
        raise ValueError(f"out={out}: NeMo cuts .ckpt off where it loads a checkpoint, so choose a name without it.")
    prepare_environment("cpu")
    target = Path(out)
    if llava is not None:
        model = read_whole(Path(llava))
        _check_tower(model, llava)
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
        _check_tower(model, vision)
        published = replace(model.vision)
        new = is_recipe(Path(vision)) and processor is None
        own = recipe_pixels(vision) if new else read_pixels(Path(vision), model.vision, processor)
        pixels = fit_tower(own, model.vision, image_size, whole=False)
        for problem in tower_problems(model.vision):
            raise ValueError(problem)
        tensors = list(_stored_parts(model, Path(vision), published, Path(language), seed, allow_pickle))
        original = Path(language)
    check_size(load_tokenizer(original), model.language.vocab_size)
    total = sum(math.prod(tensor.shape) * tensor.dtype.itemsize for tensor in tensors)
    with appearing(target) as unfinished:
        write_weights(unfinished, tensors, bytes_progress(f"importing to {target}", total))
        _keep_other_files(original, unfinished / ORIGINAL)
        model.tokenizer = str(target / ORIGINAL)
        _describe(model, pixels, unfinished / "config.yaml", seed)
        record_checksums(unfinished, WEIGHTS)  # config.yaml is the user's to change
    print(
        f"{target}: {model.name}, {total / 1e9:.3g} GB; next: "
        f"nemo-pre train experiment=NAME init_from={target} (model=of_init_from takes its model too)"
    )
    return target


def _check_tower(model: ModelConfig, directory: str) -> None:
    from nemo_pre.config.vision_towers import tower_problems

    for problem in tower_problems(model.vision):
        raise ValueError(f"{directory} cannot be imported: {problem}")


def _stored_whole(model: ModelConfig, directory: Path, allow_pickle: bool) -> Iterator[StoredTensor]:
    from nemo_pre.config.vision_families import is_native
    from nemo_pre.huggingface.qwen_vl import llava_name
    from nemo_pre.huggingface.safetensors_files import TensorSource
    from nemo_pre.huggingface.weights import hub_name, model_weights

    source, family = TensorSource(directory, allow_pickle), model.vision.family
    named = llava_name if is_native(model.vision) else partial(hub_name, family=family)
    yield from _stored(model_weights(model), source, _names(source, named, family), model)


def _stored_parts(
    model: ModelConfig, vision: Path, published: VisionConfig, language: Path, seed: int, allow_pickle: bool
) -> Iterator[StoredTensor]:
    """The tensors of a tower, which ``published`` describes as its own files do, a language model and a projector."""
    from nemo_pre.huggingface.safetensors_files import TensorSource
    from nemo_pre.huggingface.weights import HF_LANGUAGE, language_weights, projector_weights

    source = TensorSource(language, allow_pickle)
    names = _names(source, lambda name: HF_LANGUAGE + name)
    yield from _stored(list(language_weights(model.language)), source, names, model)
    yield from stored_tower(model, vision, published, seed, allow_pickle)
    yield from _new_projector(list(projector_weights(model)), model, seed)


def stored_tower(
    model: ModelConfig, vision: Path, published: VisionConfig, seed: int, allow_pickle: bool
) -> Iterator[StoredTensor]:
    """The tensors of a tower, which ``published`` describes as its own files do.

    Raises:
        ValueError: one is missing, has another shape, or has no place in the tower.
    """
    from nemo_pre.huggingface.architecture import is_recipe
    from nemo_pre.huggingface.safetensors_files import TensorSource
    from nemo_pre.huggingface.weights import TOWER, resampled_positions, tower_weights
    from nemo_pre.neva.vision import VisionTowerConfig

    if is_recipe(vision):
        values = VisionTowerConfig(model.vision, seed).configure_model().state_dict()
        yield from (_new_tensor(TOWER + name, tensor) for name, tensor in values.items())
        return
    source, family = TensorSource(vision, allow_pickle), model.vision.family
    names = _names(source, partial(_tower_name, vision=model.vision), family)
    weights = [resampled_positions(weight, model.vision) for weight in tower_weights(published)]
    yield from _stored(weights, source, names, model)


def _tower_name(name: str, vision: VisionConfig) -> str | None:
    """The name within a LLaVA of a tensor of a tower's own files, or of those of a model with one; None: it is another
    part's. The MLP of a Qwen2.5-VL's merger is one, which was trained for another language model."""
    from nemo_pre.config.vision_families import is_native
    from nemo_pre.huggingface.qwen_vl import llava_name
    from nemo_pre.huggingface.weights import HF_LANGUAGE, HF_PROJECTOR, HF_TOWER, hub_name

    name = llava_name(name) if is_native(vision) else hub_name(name)
    if name.startswith((HF_LANGUAGE, HF_PROJECTOR, *OTHER_HALF)):
        return None
    return hub_name(name if name.startswith(HF_TOWER) else HF_TOWER + name, vision.family)


def _names(source: TensorSource, named: Callable[[str], str | None], family: str | None = None) -> dict[str, str]:
    """The source's own name of each of its tensors, by its name in a LLaVA; without what is known not to matter.

    Raises:
        ValueError: two tensors are one.
    """
    from nemo_pre.huggingface.weights import HF_TOWER

    names: dict[str, str] = {}
    for name in source.names():
        ours = named(name)
        if ours is None or ours.endswith(COMPUTED):
            continue
        if family in AIMV2 and ours.startswith(HF_TOWER + AIMV2_HEAD):
            continue
        if ours in names:
            raise ValueError(f"{source.directory} has {names[ours]} and {name}, which are the same: remove one.")
        names[ours] = name
    return names


def _stored(
    weights: list[Weight], source: TensorSource, names: dict[str, str], model: ModelConfig
) -> Iterator[StoredTensor]:
    """Each weight as something to be written, once every one was found, and every tensor of the source has a place.

    Args:
        names: the source's own name of each tensor, by its name on the hub.
    """
    from nemo_pre.huggingface.distributed_checkpoint import StoredTensor

    dtypes = _checked(weights, source, names, model)
    for weight in weights:
        parts = [names[name] for name in weight.parts]
        read = partial(_read_and_join, source, parts, weight.join)
        layers = None if weight.layer is None else model.language.num_layers
        yield StoredTensor(weight.key, weight.layer, layers, weight.shape, dtypes[parts[0]], read)


def _checked(
    weights: list[Weight], source: TensorSource, names: dict[str, str], model: ModelConfig
) -> dict[str, torch.dtype]:
    """The type of each of the source's tensors that is needed.

    Raises:
        ValueError: one is missing, has another shape, is not of one type with its neighbours, or has no place.
    """
    from nemo_pre.huggingface.weights import HF_LANGUAGE

    wanted = {name: shape for weight in weights for name, shape in weight.parts.items()}
    if missing := [name for name in wanted if name not in names]:
        raise ValueError(
            f"{source.directory} has no tensor {listed(missing)}, which its config.json asks for: name a directory "
            f"that is whole."
        )
    dtypes = {}
    for name, shape in wanted.items():
        found, dtypes[names[name]] = source.describe(names[name])
        if found != shape:
            raise ValueError(
                f"{name} in {source.directory} has shape {list(found)} but its config.json makes it {list(shape)}."
            )
    for weight in weights:
        if len({dtypes[names[name]] for name in weight.parts}) > 1:
            raise ValueError(f"{', '.join(weight.parts)} in {source.directory} have several types: make them one.")
    unused = sorted(names.keys() - wanted.keys())
    head, embedding = HF_LANGUAGE + "lm_head.weight", HF_LANGUAGE + "model.embed_tokens.weight"
    if head in unused and embedding in wanted and model.language.tie_embeddings:
        if not _same(source, names[head], names[embedding]):
            raise ValueError(
                f"{source.directory} has {names[head]}, which is not its embedding, although its config.json "
                f"ties them: set tie_word_embeddings to false there."
            )
        unused.remove(head)
    if unused:
        raise ValueError(
            f"{source.directory} has {listed(unused)}, which has no place in the model that its config.json "
            f"describes: mend that, or remove what does not matter."
        )
    return dtypes


def _same(source: TensorSource, one: str, other: str) -> bool:
    return source.describe(one) == source.describe(other) and bool((source.read(one) == source.read(other)).all())


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
            shutil.copyfile(own_file(source, path.name), target / path.name)


def _describe(model: ModelConfig, pixels: Pixels, path: Path, seed: int) -> None:
    from nemo_pre.config.compose import save_resolved

    length = model.language.max_position_embeddings
    assert length is not None
    save_resolved(RunConfig(name=model.name, seed=seed, model=model, data=pixels.data(length)), path)
