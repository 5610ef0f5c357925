"""A SentencePiece model as Llama's, trained on the spot, in a directory as Vicuna's is published."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

# "USER" is a token inside a text and two behind a word mark, as in Llama's vocabulary: LLaVA's masks count on it.
TEXTS = (
    ["US US US US OTHER LATER NEVER OWNER"] * 50
    + ["SUPERUSER MULTIUSER xUSERx"] * 40
    + ["What is shown in the picture? There is a red car. How many dogs are there? Two dogs and 17 cats."] * 10
    + ["A chat between a curious user and an artificial intelligence assistant. ASSISTANT: The assistant gives"] * 10
    + ["helpful, detailed, and polite answers to the user's questions."] * 10
)


def write_vicuna_like(directory: Path, legacy: bool | None, vocab_size: int = 480) -> Path:
    """``tokenizer.model`` and ``tokenizer_config.json`` alone: BPE with byte fallback and Llama's normalization, which
    keeps white space as it is. ``legacy`` None leaves it out of the configuration, as Llama's first tokenizers did."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "tokenizer.model").write_bytes(_trained(vocab_size))
    special = {
        name: {"__type": "AddedToken", "content": token, "lstrip": False, "normalized": False, "rstrip": False}
        for name, token in (("bos_token", "<s>"), ("eos_token", "</s>"), ("unk_token", "<unk>"))
    }
    settings: dict[str, Any] = {
        "add_bos_token": True,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 2048,
        "pad_token": None,
        "padding_side": "right",
        "sp_model_kwargs": {},
        "tokenizer_class": "LlamaTokenizer",
        **({} if legacy is None else {"legacy": legacy}),
        **special,
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    return directory


def _trained(vocab_size: int) -> bytes:
    import io

    from sentencepiece import SentencePieceTrainer

    model = io.BytesIO()
    SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS),
        model_writer=model,
        vocab_size=vocab_size,
        model_type="bpe",
        byte_fallback=True,
        character_coverage=0.99995,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        split_digits=True,
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=-1,
        minloglevel=2,
    )
    return model.getvalue()


def slow_tokenizer(directory: Path) -> Any:
    """As LLaVA's own code loads it (``use_fast=False``, the unknown token for padding)."""
    from transformers import LlamaTokenizer

    tokenizer = LlamaTokenizer.from_pretrained(directory, model_max_length=2048, padding_side="right")
    tokenizer.pad_token = tokenizer.unk_token
    return tokenizer
