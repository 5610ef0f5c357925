"""Text in HTML."""

from __future__ import annotations

import re
from html import escape


def text(value: object) -> str:
    """Escaped for text and attributes; a control character, which HTML does not allow, becomes U+FFFD."""
    return escape(re.sub(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff]", "\ufffd", str(value)))


def percent(share: float) -> str:
    return f"{share:.1%}"
