"""The model card of an exported directory: what it is, how it was made, and what was measured."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import suppress
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from nemo_pre.config.schema import ModelConfig
from nemo_pre.config.vision_families import FAMILIES, is_native
from nemo_pre.huggingface.loading import SNIPPET
from nemo_pre.huggingface.qwen_vl import QWEN_VL
from nemo_pre.objectives.registry import enabled_options, metric_prefixes
from nemo_pre.run_files.checkpoints import step_of

PACKAGES = ("nemo_toolkit", "megatron-core", "torch", "transformers")


def write_card(directory: Path, saved: Any, model: ModelConfig, checkpoint: Path) -> None:
    """``README.md`` with the metadata of the hub in front.

    Args:
        directory: with ``config.json``.
        saved: the checkpoint's configuration.
    """
    own_code = "auto_map" in json.loads((directory / "config.json").read_text())
    run = checkpoint.parent.parent
    parts = [
        _front_matter(model, own_code),
        f"# {saved.name}\n\nA vision-language model: {_architecture(model, own_code)}.",
        _usage(model, own_code),
        "## Training\n\n" + _training(saved, checkpoint),
    ]
    metrics = last_metrics(run / "metrics.jsonl", step_of(checkpoint))
    if metrics:
        rows = "\n".join(f"| {name} | {value:.4g} |" for name, value in sorted(metrics.items()))
        parts.append(f"## Metrics of the run\n\nAt step {step_of(checkpoint)}.\n\n| | |\n|---|---|\n{rows}")
    parts.append("## Provenance\n\n" + _provenance(saved))
    (directory / "README.md").write_text("\n\n".join(parts) + "\n")


def last_metrics(file: Path, step: int | None) -> dict[str, float]:
    """The last values of losses and validation up to a checkpoint's step; empty where there is no such file."""
    if not file.is_file():
        return {}
    from nemo_pre.run_files.metrics import read_metrics

    last: dict[str, float] = {}
    for line in read_metrics(file):
        if step is None or line["step"] <= step:
            last |= {
                name: float(value)
                for name, value in line.items()
                if name.startswith(("val/", "lm/", *metric_prefixes())) and isinstance(value, (int, float))
            }
    return last


def _front_matter(model: ModelConfig, own_code: bool) -> str:
    kind = QWEN_VL if is_native(model.vision) else "llava"
    custom = "\n- custom_code" if own_code else ""
    return f"---\nlibrary_name: transformers\npipeline_tag: image-text-to-text\ntags:\n- {kind}{custom}\n---"


def _architecture(model: ModelConfig, own_code: bool) -> str:
    vision, language = model.vision, model.language
    decoders = {"llama": "Llama", "qwen2": "Qwen2"}
    size = f"{vision.image_size} pixels"
    if is_native(vision):
        size = f"native resolution, {vision.min_visual_tokens} to {vision.max_visual_tokens} visual tokens an image"
    text = (
        f"a {FAMILIES[vision.family].title} tower at {size} (patches of {vision.patch_size}), a "
        f"two-layer projector and a {decoders[language.family]} decoder of {language.num_layers} layers and width "
        f"{language.hidden_size}"
    )
    if own_code:
        text += f"; attention of visual tokens: {model.attention}, rotary positions: {model.rope}"
    return text


def _usage(model: ModelConfig, own_code: bool) -> str:
    remote = ", trust_remote_code=True" if own_code else ""
    warning = ""
    if FAMILIES[model.vision.family].classes is None:
        warning = "\n\nThe code beside the weights is needed: `transformers` has no such model without an encoder."
    elif model.vision.family == "aimv2_native":
        warning = (
            "\n\nThe code beside the weights is needed: `transformers` has no vision-language model with AIMv2 at "
            "native resolution."
        )
    elif is_native(model.vision) and own_code:
        warning = (
            "\n\nThe code beside the weights is needed: loaded as a plain Qwen2.5-VL the model would not find its "
            "images, or see and place their tokens in another way than it was trained with."
        )
    elif own_code:
        warning = (
            "\n\nThe code beside the weights is needed: loaded as a plain LLaVA the model would attend causally and "
            "count positions in one dimension, which it was not trained for."
        )
    return f"""## Use

```python
from PIL import Image
from transformers import AutoImageProcessor, AutoModelForImageTextToText, AutoProcessor

{SNIPPET}
model = AutoModelForImageTextToText.from_pretrained(directory{remote})
chat = [{{"role": "user", "content": [{{"type": "image"}}, {{"type": "text", "text": "What is in the picture?"}}]}}]
prompt = processor.apply_chat_template(chat, add_generation_prompt=True)
inputs = processor(images=Image.open("picture.png"), text=prompt, return_tensors="pt")
answer = model.generate(**inputs, max_new_tokens=64)[0, inputs["input_ids"].shape[1] :]
print(processor.decode(answer, skip_special_tokens=True))
```{warning}"""


def _training(saved: Any, checkpoint: Path) -> str:
    from omegaconf import OmegaConf

    if OmegaConf.is_missing(saved.trainer, "max_steps"):
        return "Imported from Hugging Face weights, not trained here."
    objectives = [objective.card(options) for objective, options in enabled_options(saved.objective)]
    terms = ["next-token prediction", *objectives]
    rows = {
        "experiment": saved.experiment,
        "step": f"{step_of(checkpoint)} of {saved.trainer.max_steps}",
        "objective": "; ".join(terms),
        "data": saved.data.name,
        "batch": f"{saved.trainer.global_batch_size} samples",
        "learning rate": f"{saved.optim.lr:g}",
        "precision": saved.precision.name,
        "started from": saved.init_from or _random_but(saved.vision_from),
        "seed": saved.seed,
    }
    table = "\n".join(f"| {name} | {value} |" for name, value in rows.items())
    config = f"```yaml\n{OmegaConf.to_yaml(saved)}```"
    whole = f"<details><summary>The whole configuration</summary>\n\n{config}\n\n</details>"
    return f"| | |\n|---|---|\n{table}\n\n{whole}"


def _random_but(vision_from: str | None) -> str:
    return "random weights" if vision_from is None else f"random weights, but the encoder from {vision_from}"


def _installed() -> Iterator[str]:
    for name in PACKAGES:
        with suppress(PackageNotFoundError):  # a backend that is not there
            yield f"{name} {version(name)}"


def _provenance(saved: Any) -> str:
    versions = ", ".join(_installed())
    lines = [f"Exported on {datetime.now(timezone.utc):%Y-%m-%d} by nemo-pre {version('nemo-pre')} ({versions})."]
    manifest = Path(saved.data.path) / "manifest.json" if saved.data.path else None
    if manifest is not None and manifest.is_file():
        described = json.loads(manifest.read_text())
        lines.append(f"Data: {described.get('dataset')}, {json.dumps(described.get('parameters', {}))}.")
    return " ".join(lines)
