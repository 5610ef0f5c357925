"""Tokenizers like those of the models we train, small and trained on the spot."""

from __future__ import annotations

import json
from typing import Any

TEXTS = ["What is shown in the picture? There is a red car. How many dogs are there? Two dogs and 17 cats."] * 5 + [
    "A chat between a curious user and an artificial intelligence assistant. USER: ASSISTANT: system user assistant",
    "The assistant gives helpful, detailed, and polite answers to the user's questions. You are a helpful assistant.",
    "im_start im_end image <| |>\n\n  spaces\tand\nlines",
]


def qwen_like() -> Any:
    """Byte-level BPE with Qwen2's splitting and control tokens, NFC, no bos; eos ends a turn."""
    from tokenizers import normalizers
    from transformers import PreTrainedTokenizerFast

    inner = _byte_level(digits=r"\p{N}")
    inner.normalizer = normalizers.NFC()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>", "<image>"]})
    return tokenizer


def llama3_like() -> Any:
    """Byte-level BPE with Llama 3's splitting and control tokens; bos goes before every text, eos ends a text."""
    from tokenizers import processors
    from transformers import PreTrainedTokenizerFast

    inner = _byte_level(digits=r"\p{N}{1,3}")
    control = ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
    inner.add_special_tokens(["<|begin_of_text|>", "<|end_of_text|>", *control])
    bos = ("<|begin_of_text|>", inner.token_to_id("<|begin_of_text|>"))
    inner.post_processor = processors.TemplateProcessing(
        single="<|begin_of_text|> $A", pair="<|begin_of_text|> $A <|begin_of_text|> $B", special_tokens=[bos]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token="<|begin_of_text|>", eos_token="<|end_of_text|>"
    )
    tokenizer.add_special_tokens({"additional_special_tokens": [*control, "<image>"]})
    return tokenizer


def _byte_level(digits: str) -> Any:
    """GPT-4's splitting, which Qwen2 and Llama 3 share but for the digits that may be together."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    pattern = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|" + digits + r"| ?[^\s\p{L}\p{N}]+[\r\n]*|"
        r"\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=500, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    inner.train_from_iterator(TEXTS, trainer)
    return inner


def llama_like(legacy: bool) -> Any:
    """BPE over SentencePiece's word marks with byte fallback; bos goes before every text.

    ``legacy``: a normalizer puts a word mark before every piece between control tokens, as in Vicuna's and Llama 2's
    ``tokenizer.json``; otherwise Metaspace does so, before the first piece of a sequence alone.
    """
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Metaspace()
    trained.train_from_iterator(TEXTS, trainers.BpeTrainer(vocab_size=300))
    model = json.loads(trained.to_str())["model"]
    names = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *model["vocab"]]
    vocabulary = {name: number for number, name in enumerate(dict.fromkeys(names))}
    merges = [tuple(merge) for merge in model["merges"]]
    inner = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    if legacy:
        inner.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        inner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    inner.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    inner.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="<unk>"
    )
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    return tokenizer
