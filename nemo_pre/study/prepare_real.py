"""What the study on a language model that has read starts from: encoder, models, features, plain text."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from nemo_pre.study.naming import VISION
from nemo_pre.study.runs import run_verb

ENCODER, FEATURES = "encoder", "features"
LONG_ENOUGH, LETTERS = 200, 0.93  # characters of a paragraph, and which part of it is letters and spaces


def layers_of(language: Path) -> int:
    """The decoder layers of a Hugging Face language model.

    Raises:
        ValueError: there is none.
    """
    file = language / "config.json"
    try:
        return int(json.loads(file.read_text())["num_hidden_layers"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"language={language} is no Hugging Face language model ({error!r}): make one with nemo-pre smollm2 "
            f"out={language}."
        ) from error


def start_directory(root: Path, seed: int, is_random: bool) -> Path:
    """The model that a seed's first stage starts from."""
    return root / f"{'random_' if is_random else ''}start_seed{seed}"


@dataclass(frozen=True)
class Starts:
    """``common``: overrides of all runs."""

    root: Path
    language: Path
    data: Path
    common: Sequence[str]
    encoder_steps: int
    platform: str

    def prepare(self, wanted: Sequence[tuple[int, bool]]) -> None:
        """Encoder, the starts (seed, random weights or not), the samples' lengths and the encoder's features: what is
        missing of them.

        Raises:
            RunFailed: a verb failed.
        """
        encoder = self.root / ENCODER
        if not encoder.exists():
            how = [f"steps={self.encoder_steps}", f"platform={self.platform}"]
            self._run("study encoder", [self.data, self.language, encoder, *how])
        for seed, is_random in wanted:
            target = start_directory(self.root, seed, is_random)
            if not target.exists():
                language = random_language(self.language, self.root, seed) if is_random else self.language
                parts = [f"vision={encoder / VISION}", f"language={language}", f"out={target}"]
                self._run("import", [*parts, f"seed={seed}", "feature_layer=-1"])
        first = start_directory(self.root, *wanted[0])
        run = ["experiment=smollm2_135m_emoji_pre", "objective=none", *self.common]
        frozen = [f"init_from={first}", "optim.freeze_vision=true", f"data.features={self.root / FEATURES}"]
        for verb in ("data lengths", "data features"):  # which of themselves do what is missing
            self._run(verb, [*run, *frozen])

    def _run(self, verb: str, words: Sequence[object]) -> None:
        threads = {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
        log = self.root / "preparation.log"
        run_verb(verb, [str(word) for word in words], verb, log, threads)


def random_language(language: Path, root: Path, seed: int) -> Path:
    """``root/random_language_seedN``: the same model with random weights, and its tokenizer."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    from nemo_pre.huggingface.atomic import appearing

    target = root / f"random_language_seed{seed}"
    if not target.exists():
        with appearing(target) as unfinished, torch.random.fork_rng():
            torch.manual_seed(seed)
            AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(language)).save_pretrained(unfinished)
            AutoTokenizer.from_pretrained(language).save_pretrained(unfinished)
    return target


def most_frequent(data: str, val_samples: int) -> dict[str, float]:
    """The share of the validation questions, all and by type, that the most frequent answer to their type is right
    for: what one who does not look can reach."""
    from nemo_pre.data.manifest import read_manifest
    from nemo_pre.data.shards import ShardedSamples

    samples = ShardedSamples(read_manifest(data, "data").shards["val"])
    answers: dict[str, Counter[str]] = {}
    for number in range(min(val_samples, len(samples))):
        record = samples.read(number, images=False).record
        answers.setdefault(record["question_types"][0], Counter())[record["conversations"][1]["value"]] += 1
    best = {kind: max(of.values()) for kind, of in answers.items()}
    shares = {f"exact_match/{kind}": best[kind] / of.total() for kind, of in answers.items()}
    return {"exact_match": sum(best.values()) / sum(of.total() for of in answers.values()), **shares}


def write_text(file: Path) -> None:
    """Prose of Python's own help: paragraphs of some length that are mostly letters."""
    if file.exists():
        return
    from pydoc_data.topics import topics

    paragraphs = [" ".join(part.split()) for topic in topics.values() for part in topic.split("\n\n")]
    chosen = [part for part in paragraphs if len(part) >= LONG_ENOUGH and _is_prose(part)]
    beside = file.with_suffix(".tmp")
    beside.write_text("\n\n".join(dict.fromkeys(chosen)), encoding="utf-8")
    os.replace(beside, file)


def _is_prose(part: str) -> bool:
    return sum(letter.isalpha() or letter == " " for letter in part) >= LETTERS * len(part)
