"""A language model that has read before it sees.

Published vision-language models start from a language model that was trained on text, whose inner layers have had no
use for pictures. A study's stand-in is taught the data's own questions and answers with the pictures taken out.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemo_pre.teaching.training import train

if TYPE_CHECKING:
    from torch import Tensor

    from nemo_pre.config.run import RunConfig

LANGUAGE, DESCRIPTION = "language", "study.json"
BATCH, LEARNING_RATE = 64, 1.5e-3


def prepare_language(run: RunConfig, runs: Path, seed: int, steps: int, device: str) -> Path:
    """``runs/language_seedN``: an HF language model of the run's size, trained for ``steps`` steps on text alone (0:
    of random weights); as it is if it is there.

    Raises:
        ValueError: it is there, made with something else.
    """
    import dataclasses

    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from nemo_pre.data.tokenizer import load_tokenizer, tokenizer_path
    from nemo_pre.huggingface.architecture import hf_config
    from nemo_pre.huggingface.atomic import appearing

    directory = runs / f"{LANGUAGE}_seed{seed}"
    made_with = {"steps": steps, "data": run.data.path, "language": dataclasses.asdict(run.model.language)}
    if directory.exists():
        if json.loads((directory / DESCRIPTION).read_text()) != made_with:
            raise ValueError(f"{directory} was made with other options: remove it, or give another runs=DIRECTORY.")
        return directory
    text = hf_config(run.model, 0, run.data.sequence_length, "float32")["text_config"]
    with torch.random.fork_rng(), appearing(directory) as unfinished:
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**text))
        if steps:
            _train(model.to(device), _texts(run), steps, f"language, seed {seed}")
        model.cpu().save_pretrained(unfinished)
        load_tokenizer(tokenizer_path(run)).save_pretrained(unfinished)
        (unfinished / DESCRIPTION).write_text(json.dumps(made_with, indent=1) + "\n")
    return directory


def _texts(run: RunConfig) -> Tensor:
    """Token ids ``[samples, longest]`` of the train split without its pictures, -100 behind the end."""
    import torch

    from nemo_pre.data.conversation import IGNORE_INDEX, IMAGE_TAG, encode
    from nemo_pre.data.manifest import read_manifest
    from nemo_pre.data.shards import ShardedSamples
    from nemo_pre.data.tokenizer import load_tokenizer, tokenizer_path

    tokenizer = load_tokenizer(tokenizer_path(run))
    samples = ShardedSamples(read_manifest(run.data.path).shards["train"])
    read = (samples.read(position, images=False) for position in range(len(samples)))
    ids = []
    for sample in read:
        turns = [
            {**turn, "value": turn["value"].replace(IMAGE_TAG, "").strip()} for turn in sample.record["conversations"]
        ]
        encoded = encode(turns, tokenizer, run.data.chat_template, run.data.sequence_length, 0, sample.where)
        ids.append(torch.tensor([*encoded.tokens, encoded.labels[-1]]))
    return torch.nn.utils.rnn.pad_sequence(ids, batch_first=True, padding_value=IGNORE_INDEX)


def _train(model: Any, texts: Tensor, steps: int, name: str) -> None:
    """Next-token prediction, questions too."""
    import torch

    def loss_of_a_batch() -> Tensor:
        labels = texts[torch.randint(len(texts), (BATCH,))].to(model.device)
        # What is behind an end is no label, and causal attention keeps it from what is before.
        loss: Tensor = model(input_ids=labels.clamp(min=0), labels=labels).loss
        return loss

    train(model.parameters(), loss_of_a_batch, steps, LEARNING_RATE, name)
