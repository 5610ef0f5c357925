"""What a published model's own image processor makes of a picture, read from its files as options of ours.

It lies in ``preprocessor_config.json``, or where ``transformers`` 5 saved it as ``image_processor`` in
``processor_config.json``. Every field is used, known to change no pixel, or refused; mean and standard deviation are
never taken from a default, and neither is a size. What an absent switch means is what the named class of
``transformers`` takes it for.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from nemo_pre.config.schema import DataConfig, VisionConfig
from nemo_pre.config.untrained import no_data
from nemo_pre.config.vision_families import FAMILIES, is_native, merge_size, token_pixels

OWN, NESTED, NESTED_KEY = "preprocessor_config.json", "processor_config.json", "image_processor"
FILTERS = {2: "bilinear", 3: "bicubic"}  # Pillow's numbers
FILTER_NAMES = {0: "nearest", 1: "lanczos", 4: "box", 5: "hamming", **FILTERS}


@dataclass(frozen=True)
class ProcessorClass:
    """A class of ``transformers`` whose pixels ours can be.

    Attributes:
        resample: its default.
        crops: cuts the middle out unless it is told otherwise, and takes a number as the shorter side's; the others
            resize to a square.
        pads: knows ``do_pad``, with the mean colour, to a square.
        native: keeps aspect ratios.
    """

    resample: int = 3
    crops: bool = False
    pads: bool = False
    native: bool = False


CLASSES = {
    "CLIPImageProcessor": ProcessorClass(crops=True),
    "BitImageProcessor": ProcessorClass(crops=True),  # DINOv2's
    "LlavaImageProcessor": ProcessorClass(crops=True, pads=True),
    "SiglipImageProcessor": ProcessorClass(),
    "ViTImageProcessor": ProcessorClass(resample=2),
    "Qwen2VLImageProcessor": ProcessorClass(native=True),
    "Qwen2_5_VLImageProcessor": ProcessorClass(native=True),  # its name for a while
}
CLASS_OF_FAMILY = {  # where a file names none
    "clip": "CLIPImageProcessor",
    "siglip": "SiglipImageProcessor",
    "dinov2": "BitImageProcessor",
    "aimv2": "CLIPImageProcessor",
    "aimv2_native": "CLIPImageProcessor",
    "qwen25_vl": "Qwen2VLImageProcessor",
    "patch_mlp": "CLIPImageProcessor",
}
USED = (
    *("do_resize", "size", "resample", "do_rescale", "rescale_factor", "do_normalize", "image_mean", "image_std"),
    *("image_processor_type", "feature_extractor_type"),
)
# Names, layouts of the result, and how fast it comes; do_convert_rgb says what becomes of pictures that are not RGB,
# which all are once they are decoded.
IRRELEVANT = (
    *("processor_class", "auto_map", "_valid_processor_keys", "model_input_names", "transformers_version"),
    *("return_tensors", "data_format", "input_data_format", "device", "disable_grouping", "use_fast", "backend"),
    *("do_convert_rgb", "default_to_square", "image_seq_length", "_name_or_path", "_processor_class"),
)


@dataclass(frozen=True)
class Pixels:
    """How pictures become numbers.

    Attributes:
        where: the file that says so.
        mean, std: of values between 0 and 1.
        image_filter, resize, crop_from: ``data.image_filter``, ``image_resize`` and ``image_crop_from``.
        size: of the square; None with native resolution.
        least, most: visual tokens, with native resolution, where the file says.
    """

    where: str
    mean: tuple[float, ...]
    std: tuple[float, ...]
    image_filter: str
    resize: str = "whole"
    crop_from: int | None = None
    size: int | None = None
    least: int | None = None
    most: int | None = None

    def data(self, sequence_length: int) -> DataConfig:
        """The options of an import, which has no data."""
        return replace(
            no_data(sequence_length),
            image_resize=self.resize,
            image_filter=self.image_filter,
            image_crop_from=self.crop_from,
        )


def recipe_pixels(recipe: str) -> Pixels:
    """The pixels of a file in recipes/model/vision."""
    from omegaconf import OmegaConf

    import recipes

    path = recipes.find("model/vision", recipe)
    values = OmegaConf.load(path)
    data = values.get("data") or {}
    vision = OmegaConf.merge(OmegaConf.structured(VisionConfig), values.model.vision)
    default = DataConfig()
    return Pixels(
        str(path),
        tuple(vision.image_mean),
        tuple(vision.image_std),
        data.get("image_filter", default.image_filter),
        data.get("image_resize", default.image_resize),
        data.get("image_crop_from", default.image_crop_from),
    )


def read_pixels(directory: Path, vision: VisionConfig, processor: str | None = None) -> Pixels:
    """What the processor in ``directory`` does with pictures for this tower.

    Args:
        processor: a folder or a JSON file that is read instead.

    Raises:
        ValueError: there is none, or one whose pixels ours cannot be; one sentence that names the field.
    """
    found = [_pixels(values, where, vision) for where, values in _files(directory, processor)]
    if not found:
        source = f"processor={processor}" if processor else str(directory)
        raise ValueError(
            f"{source} has no image processor ({OWN}, or {NESTED_KEY} in {NESTED}), which says how pictures become "
            f"pixels: add the published one, or give processor=PATH, a folder that has one or a JSON file with "
            f"image_mean, image_std, size and resample."
        )
    if len(found) > 1 and replace(found[0], where="") != replace(found[1], where=""):
        raise ValueError(f"{found[0].where} and {found[1].where} say different things of pixels: remove one of them.")
    return found[0]


def fit_tower(pixels: Pixels, vision: VisionConfig, image_size: int | None = None, whole: bool = True) -> Pixels:
    """Give the tower the processor's mean, standard deviation and size; returns the pixels at that size.

    Args:
        image_size: what the user wants instead of the processor's.
        whole: the tower of a whole model, which keeps its size.

    Raises:
        ValueError: the tower takes pictures of another size.
    """
    vision.image_mean, vision.image_std = list(pixels.mean), list(pixels.std)
    vision.min_visual_tokens = pixels.least or vision.min_visual_tokens
    vision.max_visual_tokens = pixels.most or vision.max_visual_tokens
    if is_native(vision) or pixels.size is None:
        vision.image_size = image_size or vision.image_size
        return pixels
    own = pixels.size
    if image_size is None and own != vision.image_size and (whole or vision.family != "dinov2"):
        raise ValueError(
            f"{pixels.where} makes pictures of {own} pixels and the tower's configuration has "
            f"image_size={vision.image_size}: "
            + ("make them one." if whole else f"give image_size={own} or image_size={vision.image_size}.")
        )
    vision.image_size = image_size or own  # DINOv2 resamples its positions, as transformers' own does
    crop_from = pixels.crop_from and max(round(pixels.crop_from * vision.image_size / own), vision.image_size)
    return replace(pixels, size=vision.image_size, crop_from=crop_from)


def _files(directory: Path, processor: str | None) -> list[tuple[str, dict[str, Any]]]:
    """Each processor that is there, and the file it is from."""
    source = directory if processor is None else Path(processor).expanduser()
    if processor is not None and not source.exists():
        raise ValueError(f"processor={processor} does not exist: name a folder with a {OWN}, or a JSON file.")
    names = [source] if source.is_file() else [source / OWN, source / NESTED]
    found = []
    for path in names:
        if not path.is_file():
            continue
        values = _read(path)
        nested = values.get(NESTED_KEY) if path.name == NESTED or NESTED_KEY in values else values
        if nested is None:
            continue
        if not isinstance(nested, dict):
            raise ValueError(f"{path} has {NESTED_KEY}={nested!r}, which is no JSON object: repair the file.")
        found.append((str(path), nested))
    return found


def _read(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read: {error}.") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} does not hold a JSON object.")
    return values


def _pixels(values: dict[str, Any], where: str, vision: VisionConfig) -> Pixels:
    values = {name: value for name, value in values.items() if value is not None}
    kind, name = _class_of(values, where, vision)
    read = _Fields(values, where)
    mean, std, plain = _statistics(read)
    number = _filter(read, kind.resample)
    if is_native(vision):
        found = Pixels(where, mean, std, FILTERS[number])
        least, most = _limits(read, vision) if kind.native else (None, None)
        found = replace(found, least=least, most=most)
    elif kind.native:
        raise ValueError(
            f"{where} is a {name}, which keeps aspect ratios, and {FAMILIES[vision.family].title} takes squares: give "
            f"processor=PATH of one that makes squares."
        )
    else:
        found = _square(read, kind, Pixels(where, mean, std, FILTERS[number]))
        if found.resize == "pad" and not plain:
            raise ValueError(f"{where} pads pictures whose values are not divided by 255, which is not imported.")
    for field in values:
        ignored = is_native(vision) and not kind.native and field in ("do_center_crop", "crop_size")  # AIMv2's
        if field not in (*IRRELEVANT, *read.known) and not ignored and not _says_no(field, values[field]):
            raise ValueError(
                f"{where} has {field}={values[field]!r}, of which it is not known whether it changes pixels: remove "
                f"it if it does not, or give processor=PATH of a processor without it."
            )
    return found


def _says_no(field: str, value: Any) -> bool:
    return field.startswith("do_") and value is False


class _Fields:
    """The fields of a processor's file, noting which are used."""

    def __init__(self, values: dict[str, Any], where: str) -> None:
        self.values, self.where, self.known = values, where, set(USED)

    def switch(self, name: str, default: bool | None) -> bool:
        value = self.values.get(name, default)
        self.known.add(name)
        if not isinstance(value, bool):
            raise self.wrong(name, "true or false")
        return value

    def wrong(self, name: str, wanted: str) -> ValueError:
        return ValueError(f"{self.where} has {name}={self.values.get(name)!r}: it must be {wanted}.")


def _class_of(values: dict[str, Any], where: str, vision: VisionConfig) -> tuple[ProcessorClass, str]:
    named = values.get("image_processor_type", values.get("feature_extractor_type", CLASS_OF_FAMILY[vision.family]))
    name = str(named)
    for ending in ("Fast", "Pil"):  # of another speed
        name = name.removesuffix(ending)
    name = name.removesuffix("FeatureExtractor") + "ImageProcessor" if name.endswith("FeatureExtractor") else name
    if name not in CLASSES:
        raise ValueError(
            f"{where} has image_processor_type={named}: only {', '.join(CLASSES)} are imported; give processor=PATH "
            f"of one of these that makes the same pixels."
        )
    return CLASSES[name], name


def _statistics(read: _Fields) -> tuple[tuple[float, ...], tuple[float, ...], bool]:
    """Mean and standard deviation of values between 0 and 1, and whether they are as the file has them."""
    mean: tuple[float, ...] = (0.0,) * 3
    std: tuple[float, ...] = (1.0,) * 3
    if read.switch("do_normalize", True):
        mean, std = (_three(read, name) for name in ("image_mean", "image_std"))
        if not all(value > 0 for value in std):
            raise read.wrong("image_std", "three numbers above 0")
    factor = read.values.get("rescale_factor", 1 / 255) if read.switch("do_rescale", True) else 1.0
    if isinstance(factor, bool) or not isinstance(factor, int | float) or not factor > 0:
        raise read.wrong("rescale_factor", "a number above 0")
    scale = 255 * factor  # the processor's values are so many times ours
    if abs(scale - 1) < 1e-6:
        return mean, std, True
    return tuple(value / scale for value in mean), tuple(value / scale for value in std), False


def _three(read: _Fields, name: str) -> tuple[float, ...]:
    value = read.values.get(name)
    value = [value] * 3 if isinstance(value, int | float) and not isinstance(value, bool) else value
    numbers = isinstance(value, list) and all(isinstance(v, int | float) and not isinstance(v, bool) for v in value)
    if not isinstance(value, list) or not numbers or len(value) != 3:
        raise read.wrong(name, "three numbers, which no default stands in for")
    return tuple(map(float, value))


def _filter(read: _Fields, default: int) -> int:
    value = read.values.get("resample", default)
    if isinstance(value, str):
        plain = value.rpartition(".")[2].lower()
        value = next((number for number, name in FILTER_NAMES.items() if name == plain), value)
    if isinstance(value, bool) or not isinstance(value, int) or value not in FILTERS:
        known = " or ".join(f"{number} ({name})" for number, name in FILTERS.items())
        raise read.wrong("resample", known)
    return value


def _limits(read: _Fields, vision: VisionConfig) -> tuple[int | None, int | None]:
    """The fewest and most visual tokens of an image, as far as the file says."""
    if not read.switch("do_resize", True):
        raise read.wrong("do_resize", "true: sides are rounded to whole visual tokens")
    read.known |= {"min_pixels", "max_pixels", "patch_size", "merge_size", "temporal_patch_size"}
    ours = {"patch_size": vision.patch_size, "merge_size": merge_size(vision)}
    if vision.family == "qwen25_vl":
        ours["temporal_patch_size"] = FAMILIES["qwen25_vl"].must["temporal_patch_size"]
    for name, value in ours.items():
        if read.values.get(name, value) != value:
            raise read.wrong(name, f"{value}, as the tower's configuration has it")
    size = read.values.get("size", {})
    if not isinstance(size, dict):
        raise read.wrong("size", "an object with shortest_edge and longest_edge")
    token, found = token_pixels(vision) ** 2, {}
    for limit, name, edge in (("least", "min_pixels", "shortest_edge"), ("most", "max_pixels", "longest_edge")):
        pixels = read.values.get(name, size.get(edge))
        if pixels is None:
            continue
        if isinstance(pixels, bool) or not isinstance(pixels, int) or pixels < token or pixels % token:
            raise ValueError(
                f"{read.where} has {name}={pixels!r}: it must be a multiple of the {token} pixels of a visual token."
            )
        found[limit] = pixels // token
    return found.get("least"), found.get("most")


def _square(read: _Fields, kind: ProcessorClass, found: Pixels) -> Pixels:
    """The way to a square that ours is."""
    if not read.switch("do_resize", True):
        raise read.wrong("do_resize", "true: the tower takes pictures of one size")
    shorter, side = _sides(read, "size", kind.crops)
    crop = None
    if kind.crops:
        read.known.add("crop_size")
        if read.switch("do_center_crop", True):
            _, crop = _sides(read, "crop_size", False)
    pads = kind.pads and read.switch(
        "do_pad", None
    )  # which transformers 4 and 5 take for different where it is absent
    edge = shorter or side
    assert edge is not None
    if pads or side is not None:  # a square before it is cropped
        if crop not in (None, edge):
            raise read.wrong("crop_size", f"{edge}, as size: a square is not cropped again")
        return replace(found, resize="pad" if pads else "whole", size=edge)
    if crop is None:
        raise read.wrong("size", "an object with height and width, or do_center_crop true: the tower takes squares")
    if crop > edge:
        raise read.wrong("crop_size", f"{edge}, the shorter side, or less")
    return replace(found, resize="crop", size=crop, crop_from=None if crop == edge else edge)


def _sides(read: _Fields, name: str, number_is_shorter_side: bool) -> tuple[int | None, int | None]:
    """The shorter side, or else the side of a square, in pixels."""
    value = read.values.get(name)
    if isinstance(value, dict):
        value = {key: pixels for key, pixels in value.items() if pixels is not None}
        if value.keys() == {"shortest_edge"}:
            value, number_is_shorter_side = value["shortest_edge"], True
        elif value.keys() == {"height", "width"} and value["height"] == value["width"]:
            value, number_is_shorter_side = value["height"], False
    if (
        isinstance(value, bool)
        or not isinstance(value, int)
        or value < 1
        or (name == "crop_size" and number_is_shorter_side)
    ):
        wanted = "a number of pixels, or an object with height and width that are the same"
        raise read.wrong(name, wanted + ("" if name == "crop_size" else ", or with shortest_edge alone"))
    return (value, None) if number_is_shorter_side else (None, value)
