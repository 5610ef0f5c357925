"""The demo's tokenizer: one token per word, punctuation mark and digit."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

SPECIAL_TOKENS = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
MAX_VOCABULARY = 256
TOKENIZER = "tokenizer"  # its folder beside the shards


def write_tokenizer(directory: Path, sentences: Iterable[str]) -> None:
    """Trains on ``sentences`` and saves a directory that ``AutoTokenizer.from_pretrained`` reads."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.WordLevel(unk_token=SPECIAL_TOKENS["unk_token"]))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    trainer = trainers.WordLevelTrainer(
        vocab_size=MAX_VOCABULARY, special_tokens=list(SPECIAL_TOKENS.values()), show_progress=False
    )
    tokenizer.train_from_iterator(sentences, trainer)
    assert tokenizer.get_vocab_size() < MAX_VOCABULARY, "the language outgrew the vocabulary: words became <unk>"

    directory.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(directory / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": 4096,
        "clean_up_tokenization_spaces": True,  # decodes "there ?" as "there?"
        **SPECIAL_TOKENS,
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")
    (directory / "special_tokens_map.json").write_text(json.dumps(SPECIAL_TOKENS, indent=2) + "\n")


def vocabulary_size(directory: Path) -> int:
    """The number of tokens of the tokenizer in ``directory``."""
    from tokenizers import Tokenizer

    return int(Tokenizer.from_file(str(directory / "tokenizer.json")).get_vocab_size())
