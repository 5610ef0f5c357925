"""Loading tokenizers: the one that the model names, that lies with the data, or that the weights came with. All are
loaded here."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemo_pre.config.run import RunConfig
from nemo_pre.data.hub import find_hf_file
from nemo_pre.data.manifest import MANIFEST, read_manifest

if TYPE_CHECKING:
    from tokenizers import Tokenizer

SETTINGS = "tokenizer_config.json"
# What a vocabulary lies in, by itself or with its merges: of tokenizers, of SentencePiece, of GPT-2's kind.
VOCABULARIES: tuple[tuple[str, ...], ...] = (("tokenizer.json",), ("tokenizer.model",), ("vocab.json", "merges.txt"))
LFS_POINTER = b"version https://git-lfs"
KEPT = "huggingface"  # the folder of an import's checkpoint with the source's files beside its weights


def tokenizer_path(config: RunConfig) -> str:
    """Directory or hub id of the tokenizer of a run: ``model.tokenizer``; else the one that lies with the data; else
    the one that the weights of ``init_from`` came with.

    Raises:
        ValueError: there is none.
    """
    if config.model.tokenizer:
        return str(config.model.tokenizer)
    manifest = read_manifest(config.data.path)
    found = manifest.tokenizer or (tokenizer_of_weights(config.init_from) if config.init_from else None)
    if found is None:
        also = f" nor in init_from={config.init_from}" if config.init_from else ""
        raise ValueError(
            f"No tokenizer lies with data.path={config.data.path}{also}: set model.tokenizer to an HF tokenizer "
            f"directory."
        )
    return str(found)


def tokenizer_of_weights(init_from: str) -> str | None:
    """Directory or hub id of the tokenizer that an import kept beside its weights, wherever it was moved since, or
    that a former stage's run used, be it the one that lay with its data; None where none is there."""
    from nemo_pre.run_files.checkpoints import former_stage
    from nemo_pre.run_files.saved_config import read_saved

    checkpoint = Path(former_stage(init_from))
    if (checkpoint / KEPT / SETTINGS).is_file():
        return str(checkpoint / KEPT)
    saved = read_saved(checkpoint)
    if saved.model.tokenizer is not None:
        return str(saved.model.tokenizer)
    if (Path(saved.data.path).expanduser() / MANIFEST).is_file():
        of_data = read_manifest(saved.data.path).tokenizer
        if of_data is not None:
            return str(of_data)
    return tokenizer_of_weights(saved.init_from) if saved.init_from and Path(saved.init_from).is_dir() else None


def conflicting_words(one: str | Path, other: str | Path) -> tuple[int, str, str] | None:
    """The first id that stands for another word in one directory's tokenizer than in the other's, with both words;
    None where all ids that both have are the same words', as where one merely has more.

    Raises:
        ValueError: one of them cannot be loaded.
    """
    ours, theirs = ({id: word for word, id in load_backend(path).get_vocab().items()} for path in (one, other))
    return next(((id, ours[id], theirs[id]) for id in sorted(ours.keys() & theirs) if ours[id] != theirs[id]), None)


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

    if not Path(path).is_dir():
        find_hf_file("tokenizer", str(path), SETTINGS)
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
