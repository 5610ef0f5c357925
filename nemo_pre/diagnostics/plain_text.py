"""How well a model predicts plain text that no picture goes with: what training on pictures makes it forget."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from nemo_pre.diagnostics.states import Model

PASSAGE_TOKENS, MOST_PASSAGES = 128, 64


def text_loss(model: Model, file: Path) -> dict[str, Any]:
    """The cross-entropy of the file's first ``MOST_PASSAGES`` passages of ``PASSAGE_TOKENS`` tokens, of which the
    first of each is given: ``loss`` in nats a token, over ``tokens``.

    Raises:
        ValueError: the file is not UTF-8, or has less than a passage.
    """
    try:
        tokens = torch.tensor(model.token_ids(file.read_text(encoding="utf-8")), dtype=torch.int64)
    except UnicodeDecodeError as error:
        raise ValueError(f"text={file} is not UTF-8 ({error.reason}): name a file of plain text.") from error
    passages = list(tokens[: len(tokens) // PASSAGE_TOKENS * PASSAGE_TOKENS].split(PASSAGE_TOKENS))[:MOST_PASSAGES]
    if not passages or not len(passages[0]):
        raise ValueError(f"text={file} has {len(tokens)} tokens: give {PASSAGE_TOKENS} or more.")
    total, count = model.text_loss(passages)
    return {"file": file.name, "tokens": count, "loss": total / count}
