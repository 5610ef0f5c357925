"""Names that may be a directory here or a repository of the Hugging Face hub: found at once, or refused at once.

The hub's own client asks an unreachable hub again and again, for half a minute and with pages of its transport's
words. So it is asked once here, with a short patience, before any client is.
"""

from __future__ import annotations

import os
from pathlib import Path

PATIENCE = 4.0  # seconds for the hub's first answer


def find_hf_file(option: str, source: str, name: str) -> Path:
    """The file ``name`` of a local directory, or of a hub repository that is cached or within reach.

    Args:
        option: which named ``source``.

    Raises:
        ValueError: ``source`` is neither.
    """
    directory = Path(source).expanduser()
    if directory.is_dir():
        if not (directory / name).is_file():
            raise ValueError(
                f"{option}={source} is a directory without {name}: name a transformers model's directory."
            )
        return directory / name
    if not may_be_hub_name(source):
        raise ValueError(f"{option}={source} does not exist: name a transformers model's directory, or a hub id.")
    return _hub_file(option, source, name)


def may_be_hub_name(source: str) -> bool:
    """Whether the hub could have a repository of that name."""
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    if source.startswith(("/", ".", "~")) or source.count("/") != 1 or not source.isascii():
        return False
    try:
        validate_repo_id(source)
    except HFValidationError:
        return False
    return True


def _hub_file(option: str, source: str, name: str) -> Path:
    from huggingface_hub import hf_hub_download, try_to_load_from_cache

    cached = try_to_load_from_cache(source, name)
    if isinstance(cached, str):
        return Path(cached)
    reason = _out_of_reach(source, name)
    if reason is None:
        try:
            return Path(hf_hub_download(source, name, etag_timeout=PATIENCE))
        except Exception as error:  # every transport has its own; the reason is told
            reason = f"the hub answers: {type(error).__name__}"
    raise ValueError(
        f"{option}={source} is neither a local directory nor in the hub's cache, and cannot be fetched ({reason}): "
        f"download it elsewhere and name its directory."
    )


def _out_of_reach(source: str, name: str) -> str | None:
    """Why the hub cannot give the file; None where it answers that it can."""
    from huggingface_hub import hf_hub_url
    from huggingface_hub.constants import HF_HUB_OFFLINE
    from huggingface_hub.utils import build_hf_headers

    if HF_HUB_OFFLINE or os.environ.get("TRANSFORMERS_OFFLINE"):
        return "HF_HUB_OFFLINE is set"
    import requests

    url = hf_hub_url(source, name)
    try:
        answer = requests.head(url, headers=build_hf_headers(), timeout=PATIENCE, allow_redirects=False)
    except requests.RequestException as error:
        return f"{url.split('/')[2]} does not answer: {type(error).__name__}"
    return f"the hub answers {answer.status_code}: {answer.reason}" if answer.status_code >= 400 else None
