"""Named, reversible patches.

A patch is a generator function that yields the changes it makes; :func:`patch` gives it its name and reasons::

    @patch("torch-norm-under-sp", why="...", until="...")
    def torch_norm_under_sp():
        from megatron.core.transformer.torch_norm import WrappedTorchNorm

        yield Change(WrappedTorchNorm, "__new__", staticmethod(norm_with_sp_mark), written_for="0123456789ab")

The generator runs when the patch is applied, so that importing this package imports nothing heavy.
"""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

from nemo_pre.compat import versions

_ABSENT = object()


class Effect(Protocol):
    """Something that can be done and undone exactly."""

    def do(self) -> None: ...

    def undo(self) -> None: ...


def fingerprint(function: Any) -> str:
    """The first 12 hex digits of the SHA-256 of the function's source text."""
    return hashlib.sha256(inspect.getsource(inspect.unwrap(function)).encode()).hexdigest()[:12]


@dataclass
class Change:
    """One attribute of a module, class or object gets another value.

    ``written_for`` is the fingerprint of the function that is replaced by a rewritten copy: a build that carries
    the same version number but other code is refused.
    """

    owner: Any
    attribute: str
    value: Any
    written_for: str | None = None
    _original: Any = field(default=_ABSENT, init=False, repr=False)

    @property
    def place(self) -> str:
        owner = self.owner if inspect.isclass(self.owner) or inspect.ismodule(self.owner) else type(self.owner)
        return f"{owner.__qualname__ if inspect.isclass(owner) else owner.__name__}.{self.attribute}"

    def check(self) -> None:
        if not hasattr(self.owner, self.attribute):
            raise ValueError(
                f"{self.place}, which a compatibility patch replaces, does not exist in this installation."
            )
        if self.written_for is not None:
            found = fingerprint(getattr(self.owner, self.attribute))
            if found != self.written_for:
                raise ValueError(
                    f"{self.place} has the source fingerprint {found}, the compatibility patch was written for"
                    f" {self.written_for}: install the unmodified packages of the lock file."
                )

    def do(self) -> None:
        if inspect.isclass(self.owner):
            # Through vars(): keeps staticmethod objects as they are, and tells "own" from "inherited".
            self._original = vars(self.owner).get(self.attribute, _ABSENT)
        else:  # a module or an object; torch's configuration modules have attributes that are not in vars()
            self._original = getattr(self.owner, self.attribute)
        setattr(self.owner, self.attribute, self.value)

    def undo(self) -> None:
        if self._original is _ABSENT:
            delattr(self.owner, self.attribute)
        else:
            setattr(self.owner, self.attribute, self._original)


class Patch:
    """A named set of changes; applying twice and reverting twice are harmless."""

    def __init__(self, name: str, why: str, until: str, effects: Callable[[], Iterator[Effect]]):
        self.name = name
        self.why = why
        self.until = until
        self._effects = effects
        self._done: list[Effect] | None = None

    def __repr__(self) -> str:
        return f"Patch({self.name!r}, {'applied' if self.applied else 'not applied'})"

    @property
    def applied(self) -> bool:
        return self._done is not None

    def apply(self) -> None:
        """Make the changes, all or none.

        Raises:
            ValueError: another version is installed than the patch was written for, or a target is missing.
        """
        if self.applied:
            return
        versions.check()
        effects = list(self._effects())
        for effect in effects:
            if isinstance(effect, Change):
                effect.check()
        for effect in effects:
            effect.do()
        self._done = effects

    def revert(self) -> None:
        """Restore the exact objects that were there before."""
        if self._done is None:
            return
        for effect in reversed(self._done):
            effect.undo()
        self._done = None


def patch(name: str, *, why: str, until: str) -> Callable[[Callable[[], Iterator[Effect]]], Patch]:
    """Decorator: turn a generator function that yields effects into a :class:`Patch`."""
    return lambda effects: Patch(name, why, until, effects)
