"""Named, reversible patches.

A patch is a generator function that yields the changes it makes; :func:`patch` gives it its name and reasons::

    @patch("torch-norm-under-sp", why="...", until="...", of={"megatron-core": ("0.15.3", "0.19")})
    def torch_norm_under_sp():
        from megatron.core.transformer.torch_norm import WrappedTorchNorm

        yield Change(WrappedTorchNorm, "__new__", staticmethod(norm_with_sp_mark), written_for=("0123456789ab", ...))

The generator runs when the patch is applied, so that importing this package imports nothing heavy. A patch says of
which packages' code it is, and which versions of them it was written for. A version that does not need it is named
with the reason (``unneeded={"megatron-core 0.19": "..."}``), and a package that is not installed needs no patch: there
:meth:`Patch.apply` changes nothing.
"""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable, Iterator, Mapping
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

    ``written_for`` are the fingerprints, one per version, of the function that is replaced by a rewritten copy: a
    build that carries the same version number but other code is refused.
    """

    owner: Any
    attribute: str
    value: Any
    written_for: str | tuple[str, ...] | None = None
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
            known = (self.written_for,) if isinstance(self.written_for, str) else self.written_for
            if found not in known:
                raise ValueError(
                    f"{self.place} has the source fingerprint {found}, the compatibility patch was written for"
                    f" {' or '.join(known)}: install the unmodified packages of the lock file."
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
    """A named set of changes; applying twice and reverting twice are harmless.

    Attributes:
        of: the versions it was written for, of every package whose code it changes; none for code of our own.
    """

    def __init__(
        self,
        name: str,
        why: str,
        until: str,
        effects: Callable[[], Iterator[Effect]],
        of: versions.Versions,
        unneeded: Mapping[str, str],
    ):
        self.name = name
        self.why = why
        self.until = until
        self.of = of
        self._unneeded = unneeded
        self._effects = effects
        self._done: list[Effect] | None = None

    def __repr__(self) -> str:
        return f"Patch({self.name!r}, {'applied' if self.applied else 'not applied'})"

    @property
    def applied(self) -> bool:
        return self._done is not None

    def unneeded_here(self) -> str | None:
        """Why what is installed does not need the patch, as a sentence; None: it does.

        Raises:
            ValueError: another version is installed than the patch was written for.
        """
        for package, known in self.of.items():
            found = versions.installed(package)
            if found is None:
                return f"{package} is not installed."
            for where, reason in self._unneeded.items():
                if where.startswith(f"{package} ") and versions.matching(found, [where.split(" ")[1]]):
                    return f"{package} {found} does not need it: {reason}."
            if versions.matching(found, known) is None:
                raise ValueError(
                    f"The compatibility patch '{self.name}' was written for {package} {' or '.join(known)}, and"
                    f" {found} is installed: install the versions of the lock file."
                )
        return None

    def apply(self) -> None:
        """Make the changes, all or none; none where what is installed does not need them.

        Raises:
            ValueError: another version is installed than the patch was written for, or a target is missing.
        """
        if self.applied:
            return
        versions.check()
        if self.unneeded_here() is not None:
            return
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


def patch(
    name: str, *, why: str, until: str, of: versions.Versions | None = None, unneeded: Mapping[str, str] | None = None
) -> Callable[[Callable[[], Iterator[Effect]]], Patch]:
    """Decorator: turn a generator function that yields effects into a :class:`Patch`.

    Args:
        of: by package whose code it changes, the versions it was written for.
        unneeded: by ``"package version"``, why that version does not need it.
    """
    return lambda effects: Patch(name, why, until, effects, of or {}, unneeded or {})
