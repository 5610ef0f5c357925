"""``nemo-pre diagnose``: the measures of one model, written down and drawn."""

from __future__ import annotations

import json
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

from nemo_pre.config.run import RunConfig
from nemo_pre.config.schema import DataConfig, PrecisionConfig
from nemo_pre.diagnostics.results import FORMAT, FORMAT_VERSION, REPORT, RESULTS, read_results
from nemo_pre.inference import OWN_WORDS, InferenceRun, in_own_words
from nemo_pre.options import Count, PathText, rule_of, split_paths
from nemo_pre.run_files.outputs import make_output_folder


@dataclass
class DiagnoseRun(InferenceRun):
    """Ranks that hold ``checkpoint`` and measure it; see :func:`diagnose` for the options."""

    diagnosed_data: str = ""
    num_images: int = 0
    num_fit: int = 0
    label: str | None = None
    objects: bool = False
    layers: list[int] | None = None
    text: str | None = None
    out: str = ""
    title: str = ""


def diagnose(
    model: PathText,
    data: PathText,
    out: PathText,
    num_images: int = 256,
    num_fit: int = 1024,
    label: str | None = None,
    batch_size: int = 8,
    objects: bool = False,
    layers: str | None = None,
    text: PathText | None = None,
    compare: PathText | None = None,
    title: str | None = None,
    chat_template: Annotated[str, rule_of(DataConfig, "chat_template")] | None = None,
    tensor: Count = 1,
    pipeline: Count = 1,
    replicas: int = 1,
    precision: Annotated[str, rule_of(PrecisionConfig, "name")] = "fp32",
    platform: Annotated[str, rule_of(RunConfig, "platform")] = "auto",
    trust_remote_code: bool = False,
) -> None:
    """See what becomes of a model's visual tokens, layer by layer.

      nemo-pre diagnose runs/NAME data/digits runs/NAME/diagnostics
      nemo-pre diagnose LLAVA data/coco-stuff out/b compare=out/a title=PRe

    model is a Hugging Face directory, a checkpoint or a run's directory; data what nemo-pre data wrote, with masks for
    cohesion, coupling and contrast; out gets results.json and report.html. num_images pictures of the val split are
    measured; num_fit of the train split fit the linear probes, 0 leaves them out. label is a field of the records
    that holds a class to probe for. objects=true asks for each picture of emoji's scenes by itself, too: probes of its
    concept, category, colour and place, and whether its token says its name. layers=0,7,15 measures these layers
    alone; text is a file of plain text, whose loss is measured too. compare names other results, separated by commas,
    whose curves the report shows
    beside. batch_size pictures run at a time. chat_template, tensor, pipeline, replicas and precision are a
    checkpoint's: its run's template unless given, how it is laid out over ranks, and how many such models share the
    pictures out. trust_remote_code=true runs Python files of a Hugging Face directory that are not nemo-pre's own.
    """
    from nemo_pre.launch.environment import prepare_environment

    for name, value, least in (
        ("num_images", num_images, 1),
        ("num_fit", num_fit, 0),
        ("batch_size", batch_size, 1),
        ("replicas", replicas, 1),
    ):
        if value < least:
            raise ValueError(f"{name}={value}: give {least} or more.")
    asked_layers = _numbers(layers)
    if text is not None and not Path(text).is_file():
        raise ValueError(f"text={text} is no file: name one of plain text.")
    for asked, given in (("objects=true", objects), (f"text={text}", text is not None)):
        if given and tensor * pipeline * replicas > 1:
            raise ValueError(f"{asked} takes one rank: leave out tensor, pipeline and replicas.")
    if num_fit == 1:
        raise ValueError("num_fit=1: a probe is fitted on 2 images or more, or on none (0).")
    others = [read_results(path) for path in split_paths(compare)] if compare else []
    make_output_folder("out", out)
    named = title or Path(model).resolve().name
    if (Path(model) / "config.json").is_file():
        prepare_environment(platform)
        run = DiagnoseRun(diagnosed_data=data, num_images=num_images, num_fit=num_fit, label=label, out=out)
        run.objects, run.layers, run.text, run.title = objects, asked_layers, text, named
        _diagnose_directory(model, run, batch_size, trust_remote_code)
    else:
        prepare_environment(platform, tensor * pipeline * replicas)
        with tempfile.TemporaryDirectory(prefix="nemo-pre-") as scratch:
            run = diagnose_run(model, scratch, tensor, pipeline, replicas, precision, platform)
            run.data.chat_template = chat_template or run.data.chat_template
            run.trainer.micro_batch_size, run.trainer.global_batch_size = batch_size, batch_size * replicas
            run.diagnosed_data, run.num_images, run.num_fit, run.label = data, num_images, num_fit, label
            run.objects, run.layers, run.text, run.out, run.title = objects, asked_layers, text, out, named
            _launch(run)
    _finish(out, others)


def diagnose_run(
    checkpoint: str,
    output_dir: str,
    tensor: int = 1,
    pipeline: int = 1,
    replicas: int = 1,
    precision: str = "fp32",
    platform: str = "auto",
) -> DiagnoseRun:
    """The run whose ranks hold the newest complete checkpoint behind ``checkpoint``.

    Raises:
        ValueError: there is none, or its model has native resolution.
    """
    from nemo_pre.config.vision_families import is_native
    from nemo_pre.huggingface.exporter import complete_checkpoint
    from nemo_pre.inference import inference_run

    asked = inference_run(complete_checkpoint(checkpoint, "model"), output_dir, tensor, pipeline, precision, platform)
    if is_native(asked.model.vision):
        raise ValueError(
            f"A checkpoint with native resolution (model.vision.family={asked.model.vision.family}) is not diagnosed "
            f"itself: export it with nemo-pre export and diagnose that directory."
        )
    asked.parallel.data = replicas
    return DiagnoseRun(**vars(asked))


def _launch(run: DiagnoseRun) -> None:
    from nemo_pre.checks.run import check_options
    from nemo_pre.launch.ranks import launch

    with in_own_words({**OWN_WORDS, "trainer.micro_batch_size": "batch_size"}):
        check_options(run)
    launch(run, "nemo_pre.verbs.diagnose:diagnose_rank")


def diagnose_rank(run: DiagnoseRun) -> None:
    """Measure, on every rank, the layers that are there; the first rank writes what all found."""
    import torch.distributed as dist

    from nemo_pre.launch.preload import silence

    with silence():  # what gloo, Megatron and Lightning tell of a start is not part of the results
        from nemo_pre.data.preprocessing import build_preprocessing
        from nemo_pre.diagnostics.megatron import MegatronModel
        from nemo_pre.diagnostics.samples import read_data
        from nemo_pre.inference import load_chunks

        data = read_data(run.diagnosed_data, run.num_fit, run.num_images, run.label, run.objects)
        rows = run.trainer.micro_batch_size
        model = MegatronModel(load_chunks(run), build_preprocessing(run), run, data.background, rows)
    found, kept = _measured(model, data, rows * run.parallel.pipeline, run, shown=dist.get_rank() == 0)
    everything: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everything, (found, kept.tokens if model.replicas.rank == 0 else None))
    if dist.get_rank() == 0:
        for other, tokens in everything[1:]:
            found["layers"] |= other["layers"]
            found["logit_lens"] = found["logit_lens"] or other["logit_lens"]
            kept.tokens |= tokens or {}
        _write(run, model, data, found, kept)


def _diagnose_directory(model: str, run: DiagnoseRun, batch_size: int, trust_remote_code: bool) -> None:
    from nemo_pre.diagnostics.huggingface import HuggingFaceModel
    from nemo_pre.diagnostics.samples import read_data

    pictures = read_data(run.diagnosed_data, run.num_fit, run.num_images, run.label, run.objects)
    loaded = HuggingFaceModel(model, pictures.background, trust_remote_code)
    found, kept = _measured(loaded, pictures, batch_size, run, shown=True)
    _write(run, loaded, pictures, found, kept)


def _numbers(layers: str | None) -> list[int] | None:
    """``0,7,15`` as numbers.

    Raises:
        ValueError: one is none.
    """
    if layers is None:
        return None
    words = [word.strip() for word in layers.split(",")]
    if not all(word.isdigit() for word in words):
        raise ValueError(
            f"layers={layers}: give numbers of layers separated by commas, 0 for what enters the decoder."
        )
    return sorted({int(word) for word in words})


def _measured(model: Any, data: Any, batch_size: int, run: DiagnoseRun, shown: bool) -> tuple[dict[str, Any], Any]:
    from nemo_pre.diagnostics.layers import measure
    from nemo_pre.diagnostics.pictures import KeptTokens

    kept = KeptTokens(model.num_layers, model.shown)
    total = len(data.test) + (len(data.fit) if data.tasks else 0)
    progress = _Progress(total // model.replicas.size) if shown and sys.stderr.isatty() else None
    if run.layers is not None and max(run.layers) > model.num_layers:
        raise ValueError(f"layers: {max(run.layers)} is not there, the model has {model.num_layers} layers.")
    found = measure(model, data, batch_size, keep=kept, progress=progress, only=run.layers)
    if run.text is not None:
        from nemo_pre.diagnostics.plain_text import text_loss

        found["text"] = text_loss(model, Path(run.text))
    return found, kept


def _write(run: DiagnoseRun, model: Any, data: Any, found: dict[str, Any], kept: Any) -> None:
    """results.json, and what the report shows of pictures beside it."""
    from nemo_pre.diagnostics.over_training import over_training
    from nemo_pre.diagnostics.pictures import heat_maps, tsne_pictures

    results = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "title": run.title,
        "model": model.describe(),
        "data": {
            "path": run.diagnosed_data,
            "images": len(data.test),
            "probe_fit_images": len(data.fit) if data.tasks else 0,
            "probe_tasks": [asdict(task) for task in data.tasks],
            "presence_classes": [data.class_names.get(number, f"class {number}") for number in data.presence],
            "masks": data.has_masks,
            "object_classes": {task.name: task.size for task in data.objects.tasks} if data.objects else {},
        },
        "layers": [{"layer": layer, **found["layers"][layer]} for layer in sorted(found["layers"])],
        "logit_lens": found["logit_lens"],
        "text": found.get("text"),
        "over_training": over_training(model.describe()["path"], model.num_layers),
        "pictures": {
            "heat_maps": [asdict(maps) for maps in heat_maps(kept, data.class_names)],
            "tsne": tsne_pictures(kept, data.class_names),
        },
    }
    path = Path(run.out) / RESULTS
    path.write_text(json.dumps(results, indent=1, allow_nan=False) + "\n", encoding="utf-8")


def _finish(out: str, others: list[dict[str, Any]]) -> None:
    from nemo_pre.diagnostics.report import render
    from nemo_pre.launch.environment import is_first_rank

    if not is_first_rank():
        return
    results = read_results(out)
    page = Path(out) / REPORT
    page.write_text(render(results, others), encoding="utf-8")
    first, last = results["layers"][0], results["layers"][-1]
    print(
        f"cosine of two visual tokens: {first['pairwise_cosine']:.3f} entering, {last['pairwise_cosine']:.3f} after "
        f"layer {last['layer']}; effective dimension {first['effective_dimension']} and {last['effective_dimension']}"
    )
    print(f"{Path(out) / RESULTS}, {page}")


class _Progress:
    def __init__(self, total: int) -> None:
        self._done, self._total = 0, total

    def __call__(self, count: int) -> None:
        self._done += count
        end = "\n" if self._done >= self._total else ""
        print(f"\r{self._done}/{self._total} pictures", end=end, file=sys.stderr, flush=True)
