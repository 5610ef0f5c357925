"""A trained or imported model, loaded to be asked: no data, no optimizer, any tensor and pipeline layout."""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

from nemo_pre.config.run import RunConfig
from nemo_pre.config.schema import DataConfig, PrecisionConfig
from nemo_pre.config.untrained import untrained_run
from nemo_pre.options import Count, PathText, rule_of, split_paths
from nemo_pre.run_files.json_files import check_fields, check_type, read_json_lines
from nemo_pre.run_files.outputs import check_output_file

# Options of the run that a verb sets from its own, as the check of the run calls them and as the user does.
OWN_WORDS = {
    "parallel.tensor": "tensor",
    "parallel.pipeline": "pipeline",
    "parallel.data": "replicas",
    "precision.name": "precision",
    "trainer.micro_batch_size": "micro_batch_size",
    "trainer.global_batch_size": "micro_batch_size",
    "data.chat_template": "chat_template",
}


@dataclass
class InferenceRun(RunConfig):
    """A run of ranks that load ``checkpoint`` and answer.

    Attributes:
        requests: of (prompt, paths of its images).
        answers_file: JSON lines with the answers; null prints them.
    """

    checkpoint: str = ""
    requests: list[tuple[str, list[str]]] = field(default_factory=list)
    max_new_tokens: int = 64
    answers_file: str | None = None


def generate(
    checkpoint: PathText,
    prompt: str | None = None,
    image: PathText | None = None,
    requests: PathText | None = None,
    out: PathText | None = None,
    max_new_tokens: Count = 64,
    micro_batch_size: Count = 8,
    chat_template: Annotated[str, rule_of(DataConfig, "chat_template")] | None = None,
    tensor: Count = 1,
    pipeline: Count = 1,
    precision: Annotated[str, rule_of(PrecisionConfig, "name")] = "fp32",
    platform: Annotated[str, rule_of(RunConfig, "platform")] = "auto",
) -> None:
    """Ask a model of a run or of an import; greedy, with a key-value cache.

      nemo-pre generate runs/NAME/checkpoints --image x.png --prompt "Which digit is at the top left?"
      nemo-pre generate CHECKPOINT requests=FILE.jsonl out=ANSWERS.jsonl

    A line of FILE is {"prompt": "...", "images": ["x.png"]}; paths are relative to FILE. An image goes before the
    question unless the prompt says <image> itself; several are separated by commas. chat_template is the run's unless
    given (an import has none: give llava_v1 for a LLaVA-1.5). tensor and pipeline lay the model out over ranks.
    """
    from nemo_pre.checks.run import check_options
    from nemo_pre.huggingface.exporter import complete_checkpoint
    from nemo_pre.launch.environment import prepare_environment
    from nemo_pre.launch.ranks import launch

    if (prompt is None) == (requests is None):
        raise ValueError("Give prompt=TEXT (and image=FILE), or requests=FILE.jsonl.")
    prepare_environment(platform, tensor * pipeline)
    source = complete_checkpoint(checkpoint)
    if requests is not None:
        asked = read_requests(Path(requests))
    else:
        asked = [(str(prompt), split_paths(image) if image else [])]
    with tempfile.TemporaryDirectory(prefix="nemo-pre-") as scratch:
        run = inference_run(source, scratch, tensor, pipeline, precision, platform)
        run.trainer.micro_batch_size = run.trainer.global_batch_size = micro_batch_size
        run.data.chat_template = chat_template or run.data.chat_template
        run.requests, run.max_new_tokens, run.answers_file = asked, max_new_tokens, out
        with in_own_words(OWN_WORDS):
            check_options(run)
        if out is not None:
            check_output_file("out", out)
        launch(run, "nemo_pre.inference:answer")


@contextmanager
def in_own_words(words: Mapping[str, str]) -> Iterator[None]:
    """Refusals meanwhile speak of a verb's own options, where a check speaks of the run's."""
    try:
        yield
    except ValueError as error:
        text = str(error)
        for name, own in words.items():
            text = text.replace(name, own)
        raise ValueError(text) from error


def inference_run(
    checkpoint: Path,
    output_dir: str,
    tensor: int = 1,
    pipeline: int = 1,
    precision: str = "fp32",
    platform: str = "auto",
) -> InferenceRun:
    """The run whose ranks hold the checkpoint's model, without what only training needs."""
    from nemo_pre.run_files.saved_config import read_saved, saved_model

    saved = read_saved(checkpoint)
    run = InferenceRun(**vars(untrained_run(saved_model(checkpoint), output_dir)))
    run.name, run.seed, run.platform, run.checkpoint = saved.name, saved.seed, platform, str(checkpoint)
    run.data = DataConfig(
        name=saved.data.name,
        path=saved.data.path,
        sequence_length=saved.data.sequence_length,
        chat_template=saved.data.chat_template,
        image_resize=saved.data.image_resize,
        image_filter=saved.data.image_filter,
        image_crop_from=saved.data.image_crop_from,
    )
    run.parallel.tensor, run.parallel.pipeline, run.precision.name = tensor, pipeline, precision
    return run


def load_chunks(run: InferenceRun) -> list[Any]:
    """This rank's model chunks with the checkpoint's weights, in evaluation mode.

    Raises:
        ValueError: the checkpoint lacks a weight of the model, or has one of another.
    """
    from lightning.pytorch.trainer.states import TrainerFn

    from nemo_pre.huggingface.distributed_checkpoint import CheckpointReader
    from nemo_pre.neva.model import model_chunks
    from nemo_pre.train import build_model, build_trainer, prepare_process

    on_gpu = prepare_process(run)
    CheckpointReader(run.checkpoint).check(run.model)  # Megatron would leave what is missing at its initial value
    trainer = build_trainer(run, on_gpu, callbacks=[], weights_from=run.checkpoint)
    trainer.state.fn = TrainerFn.PREDICTING  # or the strategy would ask for an optimizer
    strategy, model = trainer.strategy, build_model(run, on_gpu)
    strategy._setup_optimizers = False
    strategy.connect(model)
    strategy.setup_environment()
    model.configure_model()
    strategy.setup(trainer)
    chunks = model_chunks(trainer)
    for chunk in chunks:
        chunk.eval()
    return chunks


def answer(run: InferenceRun) -> None:
    """Load the model on every rank, answer the requests, and print or write the answers on the first."""
    import torch.distributed as dist

    from nemo_pre.data.conversation import end_of_answer
    from nemo_pre.data.preprocessing import build_preprocessing
    from nemo_pre.generation import generate as generate_tokens
    from nemo_pre.launch.silence import silence

    how = build_preprocessing(run)
    prompts = [_prompt(how, number, text, images) for number, (text, images) in enumerate(run.requests)]
    with silence():  # what gloo, Megatron and Lightning tell of a start is not part of an answer
        chunks = load_chunks(run)
    writes = dist.get_rank() == 0
    shown = _Stream(how.tokenizer) if writes and len(prompts) == 1 and run.answers_file is None else None
    answers = generate_tokens(
        chunks,
        prompts,
        run.max_new_tokens,
        end_of_answer(how.tokenizer, how.chat_template),
        min(len(how.tokenizer), run.model.language.vocab_size),
        run.trainer.micro_batch_size,
        on_token=shown,
        on_progress=_report if writes and shown is None else None,
    )
    if shown is not None:
        print(flush=True)
    elif writes:
        _write_answers(run, [how.tokenizer.decode(tokens, skip_special_tokens=True) for tokens in answers])


def _prompt(how: Any, number: int, text: str, images: list[str]) -> Any:
    import torch

    from nemo_pre.data.collate import joined_images
    from nemo_pre.data.conversation import IMAGE_TAG, encode_prompt
    from nemo_pre.generation import TokenSequence

    where = f"request {number}"
    question = text if IMAGE_TAG in text else f"{IMAGE_TAG}\n" * len(images) + text
    conversation = [{"from": "human", "value": question}]
    tokens = encode_prompt(conversation, how.tokenizer, how.chat_template, len(images), where)
    pixels = []
    for path in images:
        try:
            content = Path(path).read_bytes()
        except OSError as error:
            raise ValueError(f"The image {path} of {where} cannot be read: {error.strerror}.") from error
        pixels.append(replace(how, max_tiles=1).encode_image(content, path))
    media = joined_images(pixels, how.native is not None)
    return TokenSequence(torch.tensor(tokens, dtype=torch.int64), media["media"], grids=media.get("media_grids"))


def read_requests(path: Path) -> list[tuple[str, list[str]]]:
    """The prompt of every request in a file of JSON lines, and the paths of its images.

    Raises:
        ValueError: the file cannot be read or holds none, or one has an unknown field or one of another type.
    """
    asked = []
    for where, record in read_json_lines(path, 'lines of {"prompt": "...", "images": ["x.png"]}'):
        check_fields(record, where, {"prompt": str, "images": list}, needed=("prompt",))
        for number, image in enumerate(record.get("images", []), start=1):
            check_type(image, str, f"{where}: image {number}")
        asked.append((record["prompt"], [str(path.parent / image) for image in record.get("images", [])]))
    if not asked:
        raise ValueError(f"requests={path} holds no request.")
    return asked


class _Stream:
    """Prints an answer while it grows; a character of several tokens appears when it is whole."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._tokens: list[int] = []
        self._printed = 0

    def __call__(self, number: int, token: int) -> None:
        self._tokens.append(token)
        text = self._tokenizer.decode(self._tokens, skip_special_tokens=True)
        if not text.endswith("\N{REPLACEMENT CHARACTER}"):
            print(text[self._printed :], end="", flush=True)
            self._printed = len(text)


def _report(finished: int, total: int) -> None:
    end = "\n" if finished == total else ""
    if sys.stderr.isatty():
        print(f"\r{finished}/{total} answers", end=end, file=sys.stderr, flush=True)


def _write_answers(run: InferenceRun, answers: list[str]) -> None:
    lines = [
        json.dumps({"prompt": prompt, "images": images, "answer": answer})
        for (prompt, images), answer in zip(run.requests, answers, strict=True)
    ]
    if run.answers_file is None:
        print("\n".join(lines))
    else:
        Path(run.answers_file).write_text("\n".join(lines) + "\n")
