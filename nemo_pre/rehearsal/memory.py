"""What the rehearsed GPU holds: the storages of tensors that are alive, and the most at once."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from nemo_pre.rehearsal.lines import line_of_code

NAMED_FROM = 1 << 20  # bytes; smaller storages are counted without their line
GROWTH = 1.002  # by which the peak must grow for its contents to be noted again


@dataclass
class _Alive:
    reference: Any
    bytes: int
    what: str


class Memory:
    """Bytes of the device's storages. A caching allocator's rounding and fragmentation are not in them.

    Attributes:
        held, most: bytes now, and the most since :meth:`start_peak`.
        peak_line: the line that reached it.
    """

    def __init__(self, named_from: int = NAMED_FROM) -> None:
        self.held = self.most = 0
        self.peak_line = ""
        self.named_from = named_from
        self._alive: dict[int, _Alive] = {}
        self._noted = 0
        self._at_peak: dict[int, tuple[int, str]] = {}

    def see(self, tensor: Any) -> None:
        """Count the tensor's storage, unless it is known."""
        storage = tensor.untyped_storage()
        key, known = storage._cdata, self._alive.get(storage._cdata)
        if known is not None and known.reference() is storage:
            return
        if known is not None:  # the address was given to another storage before the callback ran
            self.held -= known.bytes
        size = storage.nbytes()
        what = ""
        if size >= self.named_from:
            what = f"{line_of_code(2)}  {list(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"

        def gone(reference: Any, key: int = key) -> None:
            mine = self._alive.get(key)
            if mine is not None and mine.reference is reference:
                self.held -= mine.bytes
                del self._alive[key]

        self._alive[key] = _Alive(weakref.ref(storage, gone), size, what)
        self.held += size
        if self.held > self.most:
            self.most = self.held
            if self.held > GROWTH * self._noted:
                self._noted = self.held
                self.peak_line = line_of_code(2)
                self._at_peak = {number: (each.bytes, each.what) for number, each in self._alive.items()}

    def start_peak(self) -> None:
        """Look for the peak from here on."""
        self.most = self._noted = self.held
        self._at_peak = {number: (each.bytes, each.what) for number, each in self._alive.items()}

    def keys(self) -> set[int]:
        """The storages that are alive."""
        return set(self._alive)

    def bytes_of(self, keys: Iterable[int]) -> int:
        return sum(self._alive[key].bytes for key in keys if key in self._alive)

    def lines_at_peak(self, without: set[int]) -> list[tuple[str, int]]:
        """What holds the most at the peak beside the storages ``without``: line, shape and type, and bytes."""
        found: Counter[str] = Counter()
        for key, (size, what) in self._at_peak.items():
            if key not in without:
                found[what or f"below {self.named_from} bytes each"] += size
        return found.most_common()

    def lines_of(self, keys: Iterable[int]) -> list[tuple[str, int]]:
        """What holds the most among storages that are alive, as :meth:`lines_at_peak` tells it."""
        found: Counter[str] = Counter()
        for key in keys:
            if key in self._alive:
                found[self._alive[key].what or f"below {self.named_from} bytes each"] += self._alive[key].bytes
        return found.most_common()
