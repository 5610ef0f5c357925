"""What a vision model of ``transformers`` gives for a picture, read from its directory without its weights."""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nemo_pre.data.hub import find_hf_file
from nemo_pre.objectives.target import Target

# Tokens before the patches, by the model_type of the vision model, beside register tokens. Of a model that is not here
# nobody has said which tokens are patches: it must have none but them, or give a map.
CLASS_TOKENS = {
    "aimv2_vision_model": 0,
    "beit": 1,
    "clip_vision_model": 1,
    "data2vec-vision": 1,
    "deit": 2,
    "dinov2": 1,
    "dinov2_with_registers": 1,
    "dinov3_vit": 1,
    "ijepa": 0,
    "siglip_vision_model": 0,
    "vit": 1,
    "vit_mae": 1,
    "vit_msn": 1,
}
PROCESSOR = "preprocessor_config.json"
WEIGHTS = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)


WRITTEN_BY_SAVING = ("_name_or_path", "architectures", "dtype", "torch_dtype", "transformers_version")


@dataclass(frozen=True)
class VisionFacts:
    """What the configuration of a vision model says of its features, without its weights.

    Attributes:
        width: of a patch's features.
        side: patches along each side of a picture.
        prefix: tokens before the patches; None where the model gives a map.
        image_size: pixels along each side of the picture it looks at.
        parameters: of the vision model.
        flops: of a forward pass over one picture.
    """

    width: int
    side: int
    prefix: int | None
    image_size: int
    parameters: int
    flops: float


def vision_facts(target: Target) -> VisionFacts:
    """Run the model without weights and memory (on the ``meta`` device), and count.

    Raises:
        ValueError: one sentence on a model that is not there, is no vision model, takes no picture of this size, or
            does not say which of its tokens are patches.
    """
    return _facts(named_path(target), target.prefix, target.image_size)


@lru_cache(maxsize=8)
def _facts(path: str, prefix: str, image_size: int | None) -> VisionFacts:
    from torch.utils.flop_counter import FlopCounterMode
    from transformers import AutoModel

    target = Target("", prefix, path, image_size)
    config = read_config(target)
    with torch.device("meta"):
        try:
            whole = AutoModel.from_config(config, attn_implementation="eager")  # of fused attention nothing is counted
        except ValueError:  # it has no class for a configuration of this kind
            raise _no_vision_model(target, config) from None
    model = vision_part(whole, target)
    size = _image_size(model.config, target)
    with FlopCounterMode(display=False) as counter, torch.no_grad(), _no_autocast():
        try:
            output = last_hidden_state(model, torch.zeros(1, 3, size, size, device="meta"))
        except (ValueError, RuntimeError, TypeError, AttributeError, NotImplementedError) as error:
            raise ValueError(
                f"{target.option('path')}={path}, a {model.config.model_type}, does not take a picture of {size} x "
                f"{size} pixels ({error}): set another {target.option('image_size')}, or null for "
                f"its own, or name another model."
            ) from error
    side, prefix_tokens = _grid_of(output, model.config, size, target)
    width = output.shape[1] if output.ndim == 4 else output.shape[2]
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return VisionFacts(width, side, prefix_tokens, size, parameters, float(counter.get_total_flops()))


@contextmanager
def _no_autocast() -> Iterator[None]:
    """DINOv3 switches autocast off where it computes its positions, which torch refuses to do on ``meta``."""
    right = torch.autocast
    torch.autocast = lambda *_, **__: nullcontext()  # type: ignore[assignment, misc]
    try:
        yield
    finally:
        torch.autocast = right  # type: ignore[misc]


def check_files(target: Target) -> None:
    """Look for configuration, processor and weights of a local directory, without reading the weights.

    Raises:
        ValueError: one sentence on what is missing.
    """
    read_statistics(target)
    directory = Path(named_path(target))
    if directory.is_dir() and not any((directory / name).is_file() for name in WEIGHTS):
        raise ValueError(
            f"{target.option('path')}={target.path} has none of {', '.join(WEIGHTS)}: download the weights too."
        )
    vision_facts(target)


@dataclass(frozen=True)
class PixelStatistics:
    """How the model's own processor normalises pixels between 0 and ``scale``."""

    mean: tuple[float, ...]
    std: tuple[float, ...]
    scale: float = 1.0


def read_statistics(target: Target) -> PixelStatistics:
    """Read them from the model's processor.

    Raises:
        ValueError: the model comes without one, or it does not say.
    """
    from transformers.utils import cached_file

    where = f"{target.option('path')}={target.path}"
    read_config(target)
    try:
        found = cached_file(named_path(target), PROCESSOR, _raise_exceptions_for_missing_entries=False)
    except OSError as error:
        raise ValueError(f"{where} cannot be reached for its {PROCESSOR}: name a directory that holds it.") from error
    if found is None:
        raise ValueError(
            f"{where} has no {PROCESSOR}, which says how its pixels are normalised: put the published one beside the "
            f"weights, or one with image_mean and image_std."
        )
    raw = json.loads(Path(found).read_text())
    scale = 255.0 * raw.get("rescale_factor", 1 / 255) if raw.get("do_rescale", True) else 255.0
    if not raw.get("do_normalize", True):
        return PixelStatistics((0.0,) * 3, (1.0,) * 3, scale)
    mean, std = raw.get("image_mean"), raw.get("image_std")
    if not (isinstance(mean, list) and isinstance(std, list) and len(mean) == len(std) == 3):
        raise ValueError(
            f"{found} has no image_mean and image_std of three colours: add those the model was trained with."
        )
    return PixelStatistics(tuple(map(float, mean)), tuple(map(float, std)), scale)


def config_digest(target: Target) -> str:
    """sha256 of what the model's ``config.json`` says of its vision model, whoever saved it."""
    from transformers.utils import cached_file

    read_config(target)
    found = cached_file(named_path(target), "config.json")
    raw = json.loads(Path(str(found)).read_text())
    said = raw.get("vision_config", raw)
    kept = {name: value for name, value in said.items() if name not in WRITTEN_BY_SAVING}
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()


def named_path(target: Target) -> str:
    """The local directory or hub id.

    Raises:
        ValueError: none is named.
    """
    if target.path is None:
        raise ValueError(f"Name a vision model's directory: {target.option('path')}=DIR.")
    directory = Path(target.path).expanduser()
    return str(directory) if directory.is_dir() else target.path


def read_config(target: Target) -> Any:
    """The configuration of ``transformers``.

    Raises:
        ValueError: there is none.
    """
    from transformers import AutoConfig

    path = named_path(target)
    find_hf_file(target.option("path"), path, "config.json")
    try:
        return AutoConfig.from_pretrained(path, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{target.option('path')}={path} is neither a transformers model's directory nor a hub id that can be "
            f"reached from here: name a downloaded copy."
        ) from error


def vision_part(whole: Any, target: Target) -> Any:
    """The vision model of CLIP, SigLIP and SAM, which have others beside it, or the model itself.

    ViT-MAE hides most patches at random unless it is told otherwise.
    """
    model = getattr(whole, "vision_encoder", getattr(whole, "vision_model", whole))
    if not hasattr(model.config, "image_size") or "pixel_values" not in _parameters_of(model):
        raise _no_vision_model(target, whole.config)
    if hasattr(model.config, "mask_ratio"):
        model.config.mask_ratio = 0.0
    return model


def _no_vision_model(target: Target, config: Any) -> ValueError:
    return ValueError(
        f"{target.option('path')}={target.path} is a {config.model_type}, which is no vision model of transformers "
        f"with pictures of one size: name one such as DINOv2, SAM, CLIP or SigLIP."
    )


def _parameters_of(model: Any) -> Any:
    return inspect.signature(model.forward).parameters


def _image_size(config: Any, target: Target) -> int:
    """Pixels along each side of the picture.

    Raises:
        ValueError: they are no multiple of a patch, or the model's own picture is no square.
    """
    size, patch = target.image_size or _side(config.image_size), _side(getattr(config, "patch_size", 1))
    if size is None or patch is None:
        raise ValueError(
            f"{target.option('path')}={target.path} has pictures or patches that are no squares: name another model."
        )
    if size % patch:
        raise ValueError(
            f"{target.option('image_size')}={size} is no multiple of the model's patches of {patch} pixels: set "
            f"{size // patch * patch or patch} or {(size // patch + 1) * patch}."
        )
    return size


def _side(value: Any) -> int | None:
    sides = set(value) if isinstance(value, (list, tuple)) else {value}
    return int(sides.pop()) if len(sides) == 1 and None not in sides else None


def last_hidden_state(model: Any, pixels: Tensor) -> Tensor:
    """The last hidden state, for pictures of whatever size the model can be brought to take, with every patch in its
    place."""
    config, known = model.config, _parameters_of(model)
    more: dict[str, Any] = {}
    if pixels.shape[-1] != _side(config.image_size) and "interpolate_pos_encoding" in known:
        more["interpolate_pos_encoding"] = True
    if "noise" in known:  # ViT-MAE sorts its patches by it
        patches = (pixels.shape[-1] // _side(config.patch_size)) ** 2
        more["noise"] = torch.arange(patches, device=pixels.device).float().expand(len(pixels), -1)
    output: Tensor = model(pixel_values=pixels, **more).last_hidden_state
    return output


def _grid_of(output: Tensor, config: Any, size: int, target: Target) -> tuple[int, int | None]:
    """Patches along a side, and the tokens before them; None for a map.

    Raises:
        ValueError: which tokens are patches cannot be told.
    """
    shape = tuple(output.shape)
    if len(shape) == 4 and shape[2] == shape[3] != shape[1]:
        return shape[2], None
    if len(shape) == 3:
        side = size // (_side(config.patch_size) or size)
        prefix = shape[1] - side * side
        expected = CLASS_TOKENS.get(config.model_type, 0) + getattr(config, "num_register_tokens", 0)
        if prefix == expected:
            return side, prefix
    raise ValueError(
        f"{target.option('path')}={target.path} is a {config.model_type} that gives {list(shape[1:])} for a picture "
        f"of {size} pixels: which of it are patches cannot be told, so name another model."
    )
