"""``nemo-pre teach``: a vision tower is taught what composed scenes show, and written where runs start from it."""

from __future__ import annotations

import json
import platform
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from nemo_pre.config.run import RunConfig
from nemo_pre.options import Count, PathText, Positive, Rule, Seed, rule_of

if TYPE_CHECKING:
    from nemo_pre.data.manifest import Manifest
    from nemo_pre.teaching.teacher import Accuracy, Teacher

WEIGHTS, CARD, PROVENANCE = "model.safetensors", "README.md", "nemo_pre"  # the last: the key of the file's metadata
PACKAGES = ("torch", "transformers", "numpy", "pillow", "nemo-pre")


def teach(
    out: PathText,
    options: Sequence[str] = (),
    data: PathText = "data/digits",
    experiment: str = "digits_tiny",
    name: str | None = None,
    steps: Count = 6000,
    batch: Count = 64,
    learning_rate: Positive = 2e-3,
    seed: Seed = 0,
    precision: Annotated[str, Rule(choices={"fp32": "", "bf16": "the tower multiplies in bfloat16"})] = "fp32",
    platform: Annotated[str, rule_of(RunConfig, "platform")] = "auto",
) -> None:
    """Teach a vision tower of random weights to name what each patch of composed scenes shows, and where it lies.

      nemo-pre teach encoders/mine                               digits_tiny's tower, of nemo-pre data demo's scenes
      nemo-pre teach encoders/deep model.vision.num_layers=6 seed=7 platform=cpu
      nemo-pre teach encoders/emoji data=data/emoji experiment=NAME name=category

    A patch is taught the name of the object that covers most of it, if that is a quarter of the patch (the masks say
    so), and the box of that object. name is the field of an object that holds its name: digit or concept unless given.
    The tower is model.vision of the experiment, which options may change. seed draws its weights and the batches. It
    is taught on the train split alone, for steps batches of batch scenes, and measured on the others.

    out becomes a directory of transformers: config.json, model.safetensors, image processor, and a README.md that says
    with what it was made and how well it reads; the weights' own metadata say the same. A run starts from it with
    vision_from=OUT. On the same machine and versions, with as many threads, the same command gives the same bytes.

    Raises:
        ValueError: one sentence on a wrong word, a tower or data that cannot be taught, or ``out`` that exists.
    """
    from nemo_pre.config.compose import compose_run
    from nemo_pre.data.manifest import read_manifest
    from nemo_pre.huggingface.atomic import appearing, refuse_existing
    from nemo_pre.launch.environment import prepare_environment, uses_gpu

    where = [f"experiment={experiment}", f"data.path={data}", f"seed={seed}", f"platform={platform}"]
    run = compose_run([*where, f"precision={precision}", *options])
    for problem in tower_problems(run):
        raise ValueError(problem)
    manifest = read_manifest(data, "data")
    refuse_existing(Path(out))
    prepare_environment(run.platform)
    from nemo_pre.teaching.scenes import TRAIN, names_of, other_splits, read_scenes
    from nemo_pre.teaching.teacher import measure, teach_tower

    device = "cuda" if uses_gpu(run.platform) else "cpu"
    numbers = names_of(manifest, name)
    scenes = read_scenes(run, manifest, TRAIN, numbers, name)
    print(f"{len(scenes):,} scenes, {len(numbers)} names of objects", flush=True)
    teacher = teach_tower(run, scenes, len(numbers), steps, batch, learning_rate, device)
    accuracy = {
        split: measure(teacher, read_scenes(run, manifest, split, numbers, name), device)
        for split in other_splits(manifest)
    }
    words: dict[str, Any] = {"data": data, "experiment": experiment, "name": name, "steps": steps, "batch": batch}
    words |= {"learning_rate": learning_rate, "seed": seed, "precision": precision, "platform": platform}
    given = [f"{key}={value}" for key, value in words.items() if value is not None]
    # Where it was written is nobody's business who reads it elsewhere.
    command = shlex.join(["nemo-pre", "teach", Path(out).name, *given, *options])
    facts = provenance(run, manifest, command, accuracy)
    with appearing(Path(out)) as unfinished:
        write_tower(teacher, run, facts, unfinished)
    for split, found in accuracy.items():
        print(f"{split}: {in_words(found, run.model.vision.image_size)}")
    print(f"{out}; next: nemo-pre train experiment=NAME vision_from={out}", flush=True)


def tower_problems(run: RunConfig) -> list[str]:
    """Why the tower of a run cannot be taught of the pixels that the run would show it; empty where it can."""
    from nemo_pre.config.vision_families import FAMILIES, is_native

    vision, problems = run.model.vision, []
    if is_native(vision) or FAMILIES[vision.family].classes is None:
        problems.append(f"model.vision.family={vision.family} cannot be taught: choose clip, siglip, dinov2 or aimv2.")
    if run.data.image_resize != "whole" or run.data.max_tiles > 1:
        problems.append("A tower is taught of whole scenes: set data.image_resize=whole data.max_tiles=1.")
    return problems


def in_words(found: Accuracy, image_size: int) -> str:
    """An accuracy as a sentence shows it; boxes in pixels of the picture as the tower sees it."""
    return (
        f"{found.objects:.1%} of {found.patches:,} patches with an object named, {found.empty:.1%} of the empty ones, "
        f"boxes {found.box * image_size:.2f} of {image_size} pixels off"
    )


def provenance(run: RunConfig, manifest: Manifest, command: str, accuracy: Mapping[str, Accuracy]) -> dict[str, Any]:
    """What a taught tower was made with, and how well it reads."""
    import torch

    from nemo_pre.rehearsal.record import commit

    return {
        "command": command,
        "seed": run.seed,
        "commit": commit(),
        "data": {
            "dataset": manifest.dataset,
            "parameters": manifest.raw.get("parameters"),
            "fingerprint": manifest.fingerprint,
        },
        "accuracy": {split: asdict(found) for split, found in accuracy.items()},
        "versions": {"python": platform.python_version(), **{each: version(each) for each in PACKAGES}},
        "machine": {"processor": platform.machine(), "threads": torch.get_num_threads()},
    }


def write_tower(teacher: Teacher, run: RunConfig, facts: Mapping[str, Any], directory: Path) -> None:
    """The tower as ``transformers`` reads it, with its image processor and where it comes from."""
    from safetensors.torch import save_file

    from nemo_pre.huggingface.processor import image_processor

    tower: Any = teacher.tower.cpu()
    tower.save_pretrained(directory)
    state = {key: tensor.contiguous() for key, tensor in tower.state_dict().items()}
    save_file(state, directory / WEIGHTS, metadata={"format": "pt", PROVENANCE: json.dumps(facts)})
    image_processor(run.model, run.data).save_pretrained(directory)
    (directory / CARD).write_text(_card(run, facts, sum(tensor.numel() for tensor in state.values())))


def read_provenance(directory: Path) -> dict[str, Any]:
    """What :func:`write_tower` wrote into the weights' metadata."""
    from safetensors import safe_open

    with safe_open(directory / WEIGHTS, "pt") as file:
        facts: dict[str, Any] = json.loads(file.metadata()[PROVENANCE])
    return facts


def _card(run: RunConfig, facts: Mapping[str, Any], parameters: int) -> str:
    vision, size = run.model.vision, run.model.vision.image_size
    versions = ", ".join(f"{each} {number}" for each, number in facts["versions"].items())
    machine, made_of = facts["machine"], facts["data"]
    rows = []
    for split, found in facts["accuracy"].items():
        read = f"{found['objects']:.1%} of {found['patches']:,} | {found['empty']:.1%} | {found['box'] * size:.2f}"
        rows.append(f"| {split} | {read} |")
    lines = [
        "# A vision tower that was taught to see\n",
        f"Family {vision.family}, {vision.num_layers} layers of width {vision.hidden_size}, {parameters:,} numbers;",
        f"pictures of {size} x {size} pixels, patches of {vision.patch_size}. It was taught, from random weights, to",
        "name the object that each patch of a composed scene shows and to say where that object's box lies; the two",
        "linear heads that said so are not here. A run starts from it with `vision_from=DIRECTORY`.\n",
        "Measured on scenes that it was not taught of:\n",
        "| split | patches with an object, named | empty ones, seen to be so | a box's sides off by, in pixels |",
        "|---|---|---|---|",
        *rows,
        f"\nMade by\n\n    {facts['command']}\n",
        f"with seed {facts['seed']}, at commit {facts['commit']}, on {machine['processor']} with {machine['threads']}",
        f"thread(s); {versions}.",
        f"Data: {made_of['dataset']}, {json.dumps(made_of['parameters'])}.",
        f"The metadata of `{WEIGHTS}` say the same.",
    ]
    return "\n".join(lines) + "\n"
