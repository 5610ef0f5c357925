"""What a rehearsed rank did in its process groups, in order."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

HOST = "host"  # the device of calls that hosts make among themselves: objects, barriers
SENDS, RECEIVES = ("send",), ("recv",)
NUMBERS = "numbers of "  # what the names of collectives of a host's tensors begin with
SETUP = "setup"  # the phase before the first step


@dataclass(frozen=True)
class Call:
    """One collective or message.

    Attributes:
        kind: ``send``, ``recv`` or the collective's name.
        group: the group's name, the same on all of its ranks.
        ranks: of the group.
        bytes: that this rank gives, of a receive those it gets.
        dtype: of the elements, empty without a tensor.
        device: ``cuda``, ``cpu`` or :data:`HOST`.
        peer: the other end of a message, the source of a broadcast; a global rank.
        batch: calls with the same number are one NCCL group call; None: by itself.
        phase: :data:`SETUP`, or the number of the step.
        where: the line of code.
    """

    kind: str
    group: str
    ranks: tuple[int, ...]
    bytes: int
    dtype: str
    device: str
    peer: int | None = None
    batch: int | None = None
    phase: str = SETUP
    where: str = ""

    @property
    def is_message(self) -> bool:
        return self.kind in (*SENDS, *RECEIVES)


@dataclass
class Log:
    """A rank's calls, and in which order it made them, waited for them, and for its device.

    Attributes:
        events: ``("call", n)``: the n-th call is made; ``("wait", n)``: what follows waits for it; ``("sync", -1)``:
            the host waits for the device.
    """

    calls: list[Call] = field(default_factory=list)
    events: list[tuple[str, int]] = field(default_factory=list)

    def call(self, call: Call) -> int:
        """Note a call; returns its number."""
        self.calls.append(call)
        self.events.append(("call", len(self.calls) - 1))
        return len(self.calls) - 1

    def wait(self, number: int) -> None:
        self.events.append(("wait", number))

    def sync(self) -> None:
        if not self.events or self.events[-1][0] != "sync":
            self.events.append(("sync", -1))

    def as_json(self) -> dict[str, Any]:
        return {"calls": [asdict(call) for call in self.calls], "events": self.events}
