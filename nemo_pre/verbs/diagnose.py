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
    that holds a class to probe for. compare names other results, separated by commas, whose curves the report shows
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
    if num_fit == 1:
        raise ValueError("num_fit=1: a probe is fitted on 2 images or more, or on none (0).")
    others = [read_results(path) for path in split_paths(compare)] if compare else []
    make_output_folder("out", out)
    named = title or Path(model).resolve().name
    if (Path(model) / "config.json").is_file():
        prepare_environment(platform)
        _diagnose_directory(model, data, out, num_images, num_fit, label, batch_size, named, trust_remote_code)
    else:
        prepare_environment(platform, tensor * pipeline * replicas)
        with tempfile.TemporaryDirectory(prefix="nemo-pre-") as scratch:
            run = diagnose_run(model, scratch, tensor, pipeline, replicas, precision, platform)
            run.data.chat_template = chat_template or run.data.chat_template
            run.trainer.micro_batch_size, run.trainer.global_batch_size = batch_size, batch_size * replicas
            run.diagnosed_data, run.num_images, run.num_fit, run.label = data, num_images, num_fit, label
            run.out, run.title = out, named
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

        data = read_data(run.diagnosed_data, run.num_fit, run.num_images, run.label)
        rows = run.trainer.micro_batch_size
        model = MegatronModel(load_chunks(run), build_preprocessing(run), run, data.background, rows)
    found, kept = _measured(model, data, rows * run.parallel.pipeline, shown=dist.get_rank() == 0)
    everything: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everything, (found, kept.tokens if model.replicas.rank == 0 else None))
    if dist.get_rank() == 0:
        for other, tokens in everything[1:]:
            found["layers"] |= other["layers"]
            found["logit_lens"] = found["logit_lens"] or other["logit_lens"]
            kept.tokens |= tokens or {}
        _write(run.out, run.title, run.diagnosed_data, model, data, found, kept)


def _diagnose_directory(
    model: str,
    data: str,
    out: str,
    num_images: int,
    num_fit: int,
    label: str | None,
    batch_size: int,
    title: str,
    trust_remote_code: bool,
) -> None:
    from nemo_pre.diagnostics.huggingface import HuggingFaceModel
    from nemo_pre.diagnostics.samples import read_data

    pictures = read_data(data, num_fit, num_images, label)
    loaded = HuggingFaceModel(model, pictures.background, trust_remote_code)
    found, kept = _measured(loaded, pictures, batch_size, shown=True)
    _write(out, title, data, loaded, pictures, found, kept)


def _measured(model: Any, data: Any, batch_size: int, shown: bool) -> tuple[dict[str, Any], Any]:
    from nemo_pre.diagnostics.layers import measure
    from nemo_pre.diagnostics.pictures import KeptTokens

    kept = KeptTokens(model.num_layers, model.shown)
    total = len(data.test) + (len(data.fit) if data.tasks else 0)
    progress = _Progress(total // model.replicas.size) if shown and sys.stderr.isatty() else None
    return measure(model, data, batch_size, keep=kept, progress=progress), kept


def _write(out: str, title: str, data_path: str, model: Any, data: Any, found: dict[str, Any], kept: Any) -> None:
    """results.json, and what the report shows of pictures beside it."""
    from nemo_pre.diagnostics.over_training import over_training
    from nemo_pre.diagnostics.pictures import heat_maps, tsne_pictures

    results = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "title": title,
        "model": model.describe(),
        "data": {
            "path": data_path,
            "images": len(data.test),
            "probe_fit_images": len(data.fit) if data.tasks else 0,
            "probe_tasks": [asdict(task) for task in data.tasks],
            "presence_classes": [data.class_names.get(number, f"class {number}") for number in data.presence],
            "masks": data.has_masks,
        },
        "layers": [{"layer": layer, **found["layers"][layer]} for layer in sorted(found["layers"])],
        "logit_lens": found["logit_lens"],
        "over_training": over_training(model.describe()["path"], model.num_layers),
        "pictures": {
            "heat_maps": [asdict(maps) for maps in heat_maps(kept, data.class_names)],
            "tsne": tsne_pictures(kept, data.class_names),
        },
    }
    path = Path(out) / RESULTS
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
