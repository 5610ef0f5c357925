"""What went wrong, in one sentence: a rank that died, a path or disk that does not do what is asked of it."""

from __future__ import annotations

import errno
from collections.abc import Iterator

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# What a path says that a user named; other errors of the system are not the user's.
OF_A_PATH = (
    *(errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EEXIST),
    *(errno.ENAMETOOLONG, errno.ELOOP, errno.ENOTEMPTY, errno.EIO, errno.ESTALE, errno.ENODEV, errno.EINVAL),
    *(errno.EBUSY, errno.EXDEV, errno.ENXIO),
)


class RankFailure(RuntimeError):
    """A rank died: the message is one sentence; ``traceback`` is the rank's, empty when a signal ended it.
    ``explained`` is whether the sentence tells a user all there is to know."""

    def __init__(self, sentence: str, traceback: str = "", explained: bool = False) -> None:
        super().__init__(sentence)
        self.traceback = traceback
        self.explained = explained


def os_sentence(error: BaseException) -> str | None:
    """The sentence about a full disk, or about the path that an ``OSError`` is about; None where ``error`` is neither
    of these nor follows from it."""
    for cause in _causes(error):
        if isinstance(cause, OSError) and cause.errno in FULL:
            where = f" for {cause.filename}" if cause.filename else ""
            return f"The disk is full{where} ({cause.strerror}): make room, or name another place."
    for cause in _causes(error):
        if isinstance(cause, OSError) and cause.filename is not None and cause.errno in OF_A_PATH:
            return f"{_shown(cause.filename)} cannot be read or written ({cause.strerror}): name another path."
    if "No space left on device" in str(error):  # of libraries that write by themselves
        return "The disk is full (No space left on device): make room, or name another place."
    return None


def _shown(name: object) -> str:
    return name.decode(errors="replace") if isinstance(name, bytes) else str(name)


def _causes(error: BaseException) -> Iterator[BaseException]:
    """The error and what it was raised from."""
    seen: set[int] = set()
    found: BaseException | None = error
    while found is not None and id(found) not in seen:
        seen.add(id(found))
        yield found
        found = found.__cause__ or found.__context__
