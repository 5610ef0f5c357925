"""Loading tokenizers: the one the run's model names, or the one that lies with the data. All are loaded here."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemo_pre.config.run import RunConfig
from nemo_pre.data.manifest import read_manifest

if TYPE_CHECKING:
    from tokenizers import Tokenizer

SETTINGS = "tokenizer_config.json"
# What a vocabulary lies in, by itself or with its merges: of tokenizers, of SentencePiece, of GPT-2's kind.
VOCABULARIES: tuple[tuple[str, ...], ...] = (("tokenizer.json",), ("tokenizer.model",), ("vocab.json", "merges.txt"))
LFS_POINTER = b"version https://git-lfs"


def tokenizer_path(config: RunConfig) -> str:
    """Directory or hub id of the tokenizer of a run."""
    if config.model.tokenizer:
        return str(config.model.tokenizer)
    manifest = read_manifest(config.data.path)
    if manifest.tokenizer is None:
        raise ValueError(
            f"no tokenizer lies with {config.data.path}: set model.tokenizer to an HF tokenizer directory"
        )
    return str(manifest.tokenizer)


def load_tokenizer(path: str | Path) -> Any:
    """A ``transformers`` fast tokenizer from a directory or hub id. Code beside it is not run, and nothing is asked.

    Raises:
        ValueError: it cannot be loaded, or has no eos token.
    """
    problem = tokenizer_problem(path)
    if problem is not None:
        raise ValueError(f"the tokenizer {path} cannot be loaded: {problem}")
    # Loader workers are forked after the tokenizer was used; its own threads would not survive that.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(
            str(path),
            use_fast=True,
            trust_remote_code=False,  # None asks at the terminal, and waits
            fix_mistral_regex=False,  # None advises other ids for every large vocabulary
        )
    except Exception as error:  # libraries raise what they like: protobuf and tokenizers a class of their own
        raise ValueError(f"the tokenizer {path} cannot be loaded: {_first_cause(path, error)}") from error
    tokenizer.init_kwargs.pop("fix_mistral_regex", None)  # or it would be saved with the tokenizer
    if tokenizer.eos_token_id is None or not tokenizer.is_fast:
        raise ValueError(f"the tokenizer {path} must be a fast one that has an eos token")
    return tokenizer


def check_size(tokenizer: Any, vocab_size: int) -> None:
    """Raises ValueError if the tokenizer has more tokens than the model embeds."""
    if len(tokenizer) > vocab_size:
        raise ValueError(
            f"the tokenizer {tokenizer.name_or_path} has {len(tokenizer)} tokens: set model.language.vocab_size to "
            f"{len(tokenizer)} or more, not {vocab_size}"
        )


def load_backend(directory: str | Path) -> Tokenizer:
    """The inner tokenizer of a directory, for counting; without ``transformers`` where ``tokenizer.json`` lies there.

    Raises:
        ValueError: it cannot be loaded.
    """
    from tokenizers import Tokenizer

    file = Path(directory) / "tokenizer.json"
    if not file.is_file():
        return load_tokenizer(directory).backend_tokenizer
    try:
        return Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises Exception itself
        raise ValueError(f"the tokenizer {directory} cannot be loaded: tokenizer.json: {error}") from error


def tokenizer_problem(path: str | Path) -> str | None:
    """What the files of a directory show to be wrong, in milliseconds and without ``transformers``; None for a hub
    id."""
    folder = Path(path).expanduser()
    if not folder.is_dir():
        return None
    if not any(all((folder / name).is_file() for name in names) for names in VOCABULARIES):
        wanted = ", nor ".join(" and ".join(names) for names in VOCABULARIES)
        return f"it has no {wanted}; copy the tokenizer's files there"
    files = (SETTINGS, "special_tokens_map.json", "added_tokens.json", *sum(VOCABULARIES, ()))
    for file in (folder / name for name in files):
        problem = _file_problem(file) if file.exists() else None
        if problem is not None:
            return f"{file.name} {problem}"
    if not (folder / SETTINGS).is_file():
        return f"it has no {SETTINGS}, which says how text is tokenized; copy it there"
    return None


def _file_problem(file: Path) -> str | None:
    try:
        with file.open("rb") as opened:
            content = opened.read(len(LFS_POINTER))
            if content == LFS_POINTER:
                return "is a pointer of Git LFS, not the file itself: fetch it with git lfs pull"
            if not content:
                return "is empty"
        if file.suffix == ".json" and not isinstance(json.loads(file.read_bytes()), dict):
            return "is not a JSON object"
    except OSError as error:
        return f"cannot be read ({error.strerror})"
    except ValueError as error:
        return f"is not JSON ({error})"
    return None


def _first_cause(path: str | Path, error: BaseException) -> str:
    """The first line of the error that the others follow from; ``transformers`` wraps it, and tries something else
    after it, whose failure says nothing."""
    model = Path(path).expanduser() / "tokenizer.model"
    if model.is_file():
        try:
            from sentencepiece import SentencePieceProcessor

            SentencePieceProcessor(model_file=str(model))
        except Exception as broken:
            return f"tokenizer.model is not a model that sentencepiece reads ({_first_line(broken)})"
    while error.__cause__ is not None or error.__context__ is not None:
        error = error.__cause__ or error.__context__  # type: ignore[assignment]
    return _first_line(error)


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0]}" if text else type(error).__name__


def padding_id(tokenizer: Any) -> int:
    """What text is padded with; Llama's tokenizer has no pad token, and padding is never looked at."""
    ids = (tokenizer.pad_token_id, tokenizer.unk_token_id, tokenizer.eos_token_id)
    return next(int(token) for token in ids if token is not None)
