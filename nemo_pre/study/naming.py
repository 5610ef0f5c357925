"""A small vision transformer that can name what it sees: taught on scenes of named pictures, offline.

Each patch that shows a picture is taught its concept, contrasted with every concept of the training split: its
feature, through a linear map, against the embeddings that a language model has of the names (the mean of its input
embeddings of a name's tokens, less the mean over names). So a name that was never shown has a place, too. A second map
reads the picture's colour, a third the patch's own mean colour, lest the encoder forget what no name says.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from nemo_pre.config.run import RunConfig
from nemo_pre.options import Count, PathText, Seed, rule_of

if TYPE_CHECKING:
    from torch import Tensor

    from nemo_pre.config.schema import VisionConfig

VISION, DESCRIPTION = "vision", "encoder.json"
LEARNING_RATE, SCALE, BATCH, AT_A_TIME = 1e-3, 20.0, 40, 128  # the last: scenes, where nothing is learned
BLANK_WEIGHT, COLOUR_WEIGHT, PIXEL_WEIGHT = 0.2, 0.3, 0.3
IMAGE_SIZE = 96  # pixels
BLANK = 0  # the class of a patch that shows no picture; concepts count from 1


def encoder(
    data: PathText,
    language: PathText,
    out: PathText,
    steps: Count = 12000,
    image_size: Count = IMAGE_SIZE,
    patch_size: Count = 16,
    width: Count = 192,
    layers: Count = 6,
    seed: Seed = 0,
    platform: Annotated[str, rule_of(RunConfig, "platform")] = "auto",
) -> None:
    """Teach a small vision transformer to name the pictures of nemo-pre data emoji, and report how well it does.

      nemo-pre study encoder data/emoji checkpoints/smollm2 encoder

    DATA is what nemo-pre data emoji wrote, LANGUAGE a Hugging Face directory whose embeddings of the names it is
    contrasted with. OUT gets vision, a SigLIP vision model for nemo-pre import vision=OUT/vision, and encoder.json:
    how it was made, and its accuracy on the val split, the held-out style, concepts and places.

    Raises:
        ValueError: the data hold no scenes of named pictures, OUT is there already, or LANGUAGE is not a model.
    """
    from nemo_pre.data.manifest import read_manifest
    from nemo_pre.huggingface.atomic import appearing, refuse_existing

    if image_size % patch_size:
        raise ValueError(f"image_size={image_size} is no multiple of patch_size={patch_size}: give one that is.")
    if width % 64:
        raise ValueError(f"width={width} is no multiple of 64, the width of a head: give one that is.")
    manifest = read_manifest(data, "data")
    if manifest.dataset != "emoji":
        raise ValueError(f"data={data} holds no scenes of named pictures: prepare them with nemo-pre data emoji.")
    target = Path(out)
    refuse_existing(target)
    from nemo_pre.launch.environment import prepare_environment, uses_gpu

    prepare_environment(platform)
    device = "cuda" if uses_gpu(platform) else "cpu"
    vision = vision_config(image_size, patch_size, width, layers)
    scenes = {split: read_scenes(data, split, vision) for split in manifest.shards}
    with appearing(target) as unfinished:
        state = target.with_name(target.name + ".state.pt")
        made = _teach(scenes, Path(language), vision, steps, seed, state, device)
        made["tower"].save_pretrained(unfinished / VISION)
        _processor(vision).save_pretrained(unfinished / VISION)
        description = {
            "steps": steps,
            "batch": BATCH,
            "seed": seed,
            "vision": asdict(vision),
            "data": manifest.raw["parameters"],
            "concepts": len(made["concepts"]),
            "accuracy": made["accuracy"],
        }
        (unfinished / DESCRIPTION).write_text(json.dumps(description, indent=1) + "\n")
    for split, found in made["accuracy"].items():
        print(f"{split}: " + ", ".join(f"{name} {value:.1%}" for name, value in found.items()))
    print(f"{target}; next: nemo-pre import vision={target / VISION} language={language} feature_layer=-1 out=OUT")


def vision_config(image_size: int, patch_size: int, width: int, layers: int) -> VisionConfig:
    """A SigLIP tower without its pooling head, whose last layer is what a projector sees."""
    from nemo_pre.config.schema import VisionConfig

    return VisionConfig(
        family="siglip",
        image_size=image_size,
        patch_size=patch_size,
        hidden_size=width,
        intermediate_size=4 * width,
        num_layers=layers,
        num_attention_heads=width // 64,
        feature_layer=-1,
        drop_class_token=False,
        pooling_head=False,
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
    )


# --- scenes ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Scenes:
    """All scenes of a split.

    Attributes:
        pixels: bfloat16 ``[N, 3, H, W]``, as the tower takes them.
        instances: int64 ``[N, patches]`` the picture that each patch shows, 0 where none, -1 where unclear.
        coverage: ``[N, 5, patches]`` of each picture, the share of it that lies in each patch; rows of zeros behind.
        names, colours: of each scene's pictures, in the order of ``coverage``; a colour may be None.
    """

    pixels: Tensor
    instances: Tensor
    coverage: Tensor
    names: list[list[str]]
    colours: list[list[str | None]]


def read_scenes(data: PathText, split: str, vision: VisionConfig) -> Scenes:
    """The scenes with pictures of a prepared split, resized for the tower.

    Raises:
        ValueError: no scene has a picture.
    """
    import torch

    from nemo_pre.data.manifest import read_manifest, verify_shards
    from nemo_pre.data.shards import ShardedSamples

    shards = read_manifest(data, "data").shards[split]
    verify_shards(shards)
    samples = ShardedSamples(shards)
    read = (scene for number in range(len(samples)) for scene in _read_one(samples, number, vision))
    # Filled one by one: a list of the parts beside what is stacked of them would take gigabytes twice.
    whole: list[Tensor] = []
    names, colours = [], []
    for number, (*parts, of_names, of_colours) in enumerate(read):
        if not whole:
            whole = [torch.empty(len(samples), *part.shape, dtype=part.dtype) for part in parts]
        for of_all, part in zip(whole, parts, strict=True):
            of_all[number] = part
        names.append(of_names)
        colours.append(of_colours)
    if not whole:
        raise ValueError(f"data={data} has no picture in its split {split}: prepare it anew with nemo-pre data emoji.")
    pixels, instances, coverage = (of_all[: len(names)] for of_all in whole)
    return Scenes(pixels, instances, coverage, names, colours)


def _read_one(samples: Any, number: int, vision: VisionConfig) -> Iterator[tuple[Any, ...]]:
    import numpy as np
    import torch

    from nemo_pre.data.decoding import decode_labels
    from nemo_pre.data.images import image_tensor
    from nemo_pre.diagnostics.objects import MOST_OBJECTS, coverage
    from nemo_pre.diagnostics.patches import patch_classes
    from nemo_pre.diagnostics.samples import MASK
    from nemo_pre.diagnostics.states import square_patches

    raw = samples.read(number)
    if not raw.images:
        return
    size = vision.image_size
    pixels = image_tensor(raw.images[0], size, vision.image_mean, vision.image_std, raw.where).bfloat16()
    mask = decode_labels(samples.read_member(number, MASK)).resize((size, size), 0)  # 0: nearest
    side = size // vision.patch_size
    patches = square_patches(torch.from_numpy(np.array(mask))[None].long(), side, side)[..., 0]
    pictures = raw.record["scene"]["pictures"]
    shares = torch.zeros(MOST_OBJECTS, side * side)
    shares[: len(pictures)] = coverage(patches, [placed["instance"] for placed in pictures])
    yield (
        pixels,
        patch_classes(patches, background=0),
        shares,
        [placed["name"] for placed in pictures],
        [placed["colour"] for placed in pictures],
    )


# --- teaching -------------------------------------------------------------------------------------------------------


def name_embeddings(language: Path, names: list[str]) -> Tensor:
    """Unit vectors ``[names, width]``: the mean input embedding of each name's tokens, less the mean over names."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if not (language / "config.json").is_file():
        raise ValueError(f"language={language} is no Hugging Face directory: make one with nemo-pre smollm2 out=DIR.")
    tokenizer = AutoTokenizer.from_pretrained(language)
    table = AutoModelForCausalLM.from_pretrained(language, dtype="float32").get_input_embeddings().weight.detach()
    means = torch.stack(
        [table[tokenizer(" " + name, add_special_tokens=False)["input_ids"]].mean(0) for name in names]
    )
    return torch.nn.functional.normalize(means - means.mean(0), dim=1)


def _teach(
    scenes: dict[str, Scenes], language: Path, vision: VisionConfig, steps: int, seed: int, state: Path, device: str
) -> dict[str, Any]:
    """The tower, the concepts it was taught, and its accuracy; what a killed teaching has left is gone on from."""
    import torch
    from torch import nn

    from nemo_pre.neva.vision import VisionTowerConfig, encoder_features
    from nemo_pre.teaching.training import train

    trained = sorted({name for names in scenes["train"].names for name in names})
    unseen = sorted({name for split in scenes.values() for names in split.names for name in names} - {*trained})
    embeddings = name_embeddings(language, [*trained, *unseen]).to(device)
    colours = sorted({colour for of in scenes["train"].colours for colour in of if colour})
    torch.manual_seed(seed)
    tower: Any = VisionTowerConfig(vision, seed).configure_model()
    tower.set_attn_implementation("eager")  # of few tokens, in two thirds of the time
    tower.to(device)
    heads = Heads(vision.hidden_size, embeddings.shape[1], len(colours)).to(device)
    targets = _targets(scenes["train"], trained, colours)
    num_patches = scenes["train"].instances.shape[1]

    def features(pixels: Tensor) -> Tensor:
        with torch.autocast(device, torch.bfloat16):
            found: Tensor = encoder_features(tower, pixels.to(device), vision.feature_layer, num_patches)
        return found

    def loss_of_a_batch() -> Tensor:
        chosen = torch.randint(len(targets[0]), (BATCH,))
        parts = (scenes["train"].pixels[chosen].float(), targets[0][chosen], targets[1][chosen])
        pixels, concepts, colour = (part.to(device) for part in parts)
        if torch.rand(()) < 0.5:
            pixels, concepts, colour = _mirrored(pixels, concepts, colour)
        found = features(_varied(pixels))
        with torch.autocast(device, torch.bfloat16):
            scores = heads.concepts(found, embeddings[: len(trained)])
        names = _naming_loss(scores.float().flatten(0, 1), concepts.flatten())
        of_colour = nn.functional.cross_entropy(
            heads.colour(found.float()).flatten(0, 1), colour.flatten(), ignore_index=-1
        )
        of_pixels = nn.functional.mse_loss(heads.pixels(found.float()), _patch_colours(pixels, vision.patch_size))
        return names + COLOUR_WEIGHT * of_colour + PIXEL_WEIGHT * of_pixels

    parameters = [*tower.parameters(), *heads.parameters()]
    train(parameters, loss_of_a_batch, steps, LEARNING_RATE, "encoder", state)
    tower.eval()
    accuracy = {
        split: _accuracy(of, features, heads, embeddings, [*trained, *unseen], len(trained), colours)
        for split, of in scenes.items()
        if split != "train"
    }
    return {"tower": tower.cpu(), "concepts": trained, "accuracy": accuracy}


def _naming_loss(scores: Tensor, concepts: Tensor) -> Tensor:
    """Cross-entropy of the patches that show a picture, and a little of those that show none."""
    import torch

    each = torch.nn.functional.cross_entropy(scores, concepts, ignore_index=-1, reduction="none")
    shown, blank = concepts > BLANK, concepts == BLANK
    named, empty = ((each * where).sum() / where.sum().clamp(min=1) for where in (shown, blank))
    return named + BLANK_WEIGHT * empty


def Heads(width: int, embedding: int, colours: int) -> Any:  # noqa: N802  (a module, whose class needs torch)
    """What is read off a patch's feature: its concept, its picture's colour, and its own mean colour."""
    import torch
    from torch import nn

    class Readers(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.LayerNorm(width)
            self.name = nn.Linear(width, embedding)
            self.blank = nn.Parameter(torch.randn(1, embedding))
            self.scale = nn.Parameter(torch.tensor(SCALE).log())
            self.colour = nn.Linear(width, colours)
            self.pixels = nn.Linear(width, 3)

        def concepts(self, features: Tensor, names: Tensor) -> Tensor:
            """Scores ``[..., 1 + names]`` of a patch that shows none, and of each name."""
            found = nn.functional.normalize(self.name(self.norm(features.float())), dim=-1)
            blank = nn.functional.normalize(self.blank, dim=-1)
            return self.scale.exp() * found @ torch.cat([blank, names]).T

    return Readers()


def _targets(scenes: Scenes, concepts: list[str], colours: list[str]) -> tuple[Tensor, Tensor]:
    """``[N, patches]`` the concept (from 1, 0 for none) and the colour each patch shows, -1 where unknown."""
    import torch

    from nemo_pre.diagnostics.objects import MOST_OBJECTS

    number = {name: 1 + place for place, name in enumerate(concepts)}
    classes = MOST_OBJECTS + 2  # none, each picture, and behind them what is unclear
    found = []
    for names, of_colours in zip(scenes.names, scenes.colours, strict=True):
        rows = torch.full((2, classes), -1)
        rows[0, BLANK] = BLANK
        for instance, (name, colour) in enumerate(zip(names, of_colours, strict=True), start=1):
            rows[0, instance] = number[name]
            rows[1, instance] = colours.index(colour) if colour else -1
        found.append(rows)  # a patch that is unclear, -1, takes the last, which is -1
    table = torch.stack(found)
    return table[:, 0].gather(1, scenes.instances % classes), table[:, 1].gather(1, scenes.instances % classes)


def _mirrored(pixels: Tensor, *grids: Tensor) -> tuple[Tensor, ...]:
    """Left and right exchanged, in pixels and in grids ``[N, patches]``."""
    side = round(grids[0].shape[1] ** 0.5)
    return pixels.flip(3), *(grid.view(-1, side, side).flip(2).flatten(1) for grid in grids)


def _varied(pixels: Tensor) -> Tensor:
    """Each picture's brightness, contrast and saturation changed a little, as styles differ in these."""
    import torch

    n = len(pixels)
    gain, shift = (
        1 + 0.4 * (torch.rand(n, 1, 1, 1, device=pixels.device) - 0.5),
        0.4 * (torch.rand(n, 1, 1, 1, device=pixels.device) - 0.5),
    )
    grey, colourful = pixels.mean(1, keepdim=True), 1 + 0.8 * (torch.rand(n, 1, 1, 1, device=pixels.device) - 0.5)
    tint = 0.1 * torch.randn(n, 3, 1, 1, device=pixels.device)
    changed = (grey + colourful * (pixels - grey)) * gain + shift + tint
    return changed + 0.1 * torch.rand(n, 1, 1, 1, device=pixels.device) * torch.randn_like(pixels)


def _patch_colours(pixels: Tensor, patch: int) -> Tensor:
    """``[N, patches, 3]``: the mean colour of each patch, row by row."""
    import torch

    return torch.nn.functional.avg_pool2d(pixels, patch).flatten(2).transpose(1, 2)


def _accuracy(
    scenes: Scenes,
    features: Any,
    heads: Any,
    embeddings: Tensor,
    names: list[str],
    num_trained: int,
    colours: list[str],
) -> dict[str, float]:
    """Shares of pictures named right: the scores of a picture's patches, weighted by how much of it they show, decide.

    A held-out concept is sought among all names, which is what makes it hard; the others among those of training.
    """
    import torch

    number = {name: place for place, name in enumerate(names)}
    right: dict[str, list[bool]] = {"name": [], "among 5": [], "name, one large picture": [], "colour": []}
    with torch.no_grad():
        for start in range(0, len(scenes.names), AT_A_TIME):
            part = slice(start, start + AT_A_TIME)
            found = features(scenes.pixels[part].float()).float()
            wanted = {name for of in scenes.names[part] for name in of}
            among = num_trained if all(number[name] < num_trained for name in wanted) else len(names)
            scores = heads.concepts(found, embeddings[:among])[..., 1:].cpu()
            of_pictures = scenes.coverage[part] @ scores
            of_colours = scenes.coverage[part] @ heads.colour(found).cpu()
            for scene, (of, told) in enumerate(zip(scenes.names[part], scenes.colours[part], strict=True)):
                for place, (name, colour) in enumerate(zip(of, told, strict=True)):
                    best = of_pictures[scene, place].topk(5).indices.tolist()
                    right["name"].append(best[0] == number[name])
                    right["among 5"].append(number[name] in best)
                    if len(of) == 1 and float(scenes.coverage[start + scene, place].max()) < 0.25:
                        right["name, one large picture"].append(best[0] == number[name])
                    if colour in colours:
                        right["colour"].append(int(of_colours[scene, place].argmax()) == colours.index(colour))
    return {name: sum(of) / len(of) for name, of in right.items() if of}


def _processor(vision: VisionConfig) -> Any:
    from nemo_pre.config.schema import DataConfig, ModelConfig
    from nemo_pre.huggingface.processor import image_processor

    return image_processor(ModelConfig(name="encoder", vision=vision), DataConfig(name="emoji", path=""))
