"""Whether the calls of all ranks meet: a discrete simulation of NCCL's rules, without times.

What is simulated of every rank is its host, which runs ahead, its compute stream, and a stream for each communicator:

- A communicator is made at its first call, and the hosts of all its ranks wait for it there. A group's collectives and
  batched messages share the group's; two ranks' single messages have one of their own in each group (torch's
  ProcessGroupNCCL).
- A call enters its communicator's stream, which runs calls one after the other; it starts when the compute stream has
  come to the place where it was made, and ends when the calls it meets have started. Messages of a batch are one call.
- A wait stops the compute stream until the call has ended. Where the host waits for its device (``.item()``) it stands
  until its compute stream is there. Calls of CPU tensors and of objects are the host's own.

Ranks that are not simulated are taken to come when they are expected.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from nemo_pre.rehearsal.calls import Call, Log

Communicator = tuple[object, ...]


@dataclass
class Met:
    """What the simulation found.

    Attributes:
        messages, collectives: how many met.
        problem: in one sentence, why the ranks do not come to their end; None: they do.
    """

    messages: int = 0
    collectives: int = 0
    problem: str | None = None


@dataclass
class _Operation:
    """A collective, a message, or the messages of a batch, of one rank."""

    rank: int
    calls: list[Call]
    open: list[Call]  # messages that have not met theirs
    started: bool = False
    ended: bool = False

    def __str__(self) -> str:
        first = self.calls[0]
        peer = "" if first.peer is None else f" {'to' if first.kind == 'send' else 'from'} rank {first.peer}"
        more = f" and {len(self.calls) - 1} more" if len(self.calls) > 1 else ""
        what = f"{first.kind} of {first.bytes} bytes {first.dtype}".rstrip()
        return f"{what}{peer}{more} over {_named(first)} ({first.where or 'no line'}, {_phase(first)})"


@dataclass
class _Rank:
    number: int
    log: Log
    host: int = 0  # events that it has passed
    compute: int = 0
    operations: dict[int, _Operation] = field(default_factory=dict)  # by the number of a call
    streams: dict[Communicator, deque[_Operation]] = field(default_factory=lambda: defaultdict(deque))
    batches: dict[int, _Operation] = field(default_factory=dict)

    @property
    def done(self) -> bool:
        return self.host == len(self.log.events) == self.compute


class _Mismatch(Exception):
    """Two ranks' calls meet and are not the same."""


def meet(logs: Mapping[int, Log]) -> Met:
    """Run the ranks' logs against each other.

    Args:
        logs: by global rank.
    """
    return _Simulation(logs).run()


class _Simulation:
    def __init__(self, logs: Mapping[int, Log]) -> None:
        self.ranks = {number: _Rank(number, log) for number, log in logs.items()}
        self.made: set[Communicator] = set()
        self.arrived: dict[Communicator, set[int]] = defaultdict(set)
        self.met = Met()

    def run(self) -> Met:
        try:
            moved = True
            while moved:
                moved = False
                for rank in self.ranks.values():
                    moved |= self._advance(rank)
        except _Mismatch as mismatch:
            self.met.problem = str(mismatch)
            return self.met
        self.met.problem = self._stuck()
        return self.met

    # --- one rank's way ---------------------------------------------------------------------------------------------

    def _advance(self, rank: _Rank) -> bool:
        """Let the rank go as far as it can; whether it went anywhere."""
        before = rank.host, rank.compute
        while self._host_step(rank) or self._compute_step(rank):
            pass
        return (rank.host, rank.compute) != before

    def _host_step(self, rank: _Rank) -> bool:
        if rank.host == len(rank.log.events):
            return False
        kind, number = rank.log.events[rank.host]
        if kind == "sync":
            if rank.compute < rank.host:
                return False
        elif kind == "wait":
            operation = rank.operations[number]
            if not _on_device(operation.calls[0]) and not operation.ended:
                return False
        elif not self._make(rank, rank.log.calls[number], number):
            return False
        rank.host += 1
        return True

    def _make(self, rank: _Rank, call: Call, number: int) -> bool:
        """Let the host make a call; False while it waits for the communicator to be made."""
        communicator = _communicator(rank.number, call)
        if communicator not in self.made:
            self.arrived[communicator].add(rank.number)
            if not self._members(rank.number, call) <= self.arrived[communicator]:
                return False
            self.made.add(communicator)
        operation = rank.batches.get(call.batch) if call.batch is not None else None
        if operation is None:
            operation = _Operation(rank.number, [], [])
            rank.streams[communicator].append(operation)
            if call.batch is not None:
                rank.batches[call.batch] = operation
        operation.calls.append(call)
        if call.is_message:
            operation.open.append(call)
        rank.operations[number] = operation
        if not _on_device(call):
            operation.started = True
            self._run_stream(communicator)
        return True

    def _compute_step(self, rank: _Rank) -> bool:
        if rank.compute == rank.host:
            return False
        kind, number = rank.log.events[rank.compute]
        if kind == "call":
            operation = rank.operations[number]
            # The last call of a batch starts it.
            if _on_device(operation.calls[0]) and operation.calls[-1] is rank.log.calls[number]:
                if operation.calls[0].batch is not None and not self._batch_is_whole(rank, number):
                    return False
                operation.started = True
                self._run_stream(_communicator(rank.number, operation.calls[0]))
        elif kind == "wait" and not rank.operations[number].ended and _on_device(rank.operations[number].calls[0]):
            return False
        rank.compute += 1
        return True

    def _batch_is_whole(self, rank: _Rank, number: int) -> bool:
        """Whether the host has made every call of the batch that this one seems to end."""
        calls = rank.log.calls
        return (
            number + 1 == len(calls) or calls[number + 1].batch != calls[number].batch or number + 1 in rank.operations
        )

    # --- communicators ----------------------------------------------------------------------------------------------

    def _members(self, rank: int, call: Call) -> set[int]:
        """The simulated ranks of the call's communicator."""
        ranks = {rank, call.peer} if _is_pair(call) else set(call.ranks)
        return {number for number in ranks if number in self.ranks}

    def _run_stream(self, communicator: Communicator) -> None:
        """End every call at the head of a rank's stream that meets the others'."""
        moved = True
        while moved:
            moved = False
            for rank in self.ranks.values():
                stream = rank.streams.get(communicator)
                if stream and stream[0].started:
                    moved |= self._meet(communicator, rank, stream[0])

    def _meet(self, communicator: Communicator, rank: _Rank, operation: _Operation) -> bool:
        first = operation.calls[0]
        if first.is_message:
            return self._meet_messages(communicator, rank, operation)
        heads = []
        for number in sorted(self._members(rank.number, first)):
            stream = self.ranks[number].streams.get(communicator)
            if not stream or not stream[0].started or stream[0].calls[0].is_message:
                return False
            heads.append(stream[0])
        for other in heads[1:]:
            if _what(other.calls[0]) != _what(heads[0].calls[0]):
                raise _Mismatch(
                    f"Rank {other.rank} comes with {other}, where rank {heads[0].rank} comes with {heads[0]}."
                )
        for head in heads:
            self._end(communicator, head)
        self.met.collectives += 1
        return True

    def _meet_messages(self, communicator: Communicator, rank: _Rank, operation: _Operation) -> bool:
        moved = False
        for call in list(operation.open):
            assert call.peer is not None
            if call.peer not in self.ranks:
                operation.open.remove(call)
                moved = True
                continue
            theirs = self.ranks[call.peer].streams.get(communicator)
            if not theirs or not theirs[0].started:
                continue
            other = next(
                (each for each in theirs[0].open if each.peer == rank.number and each.kind != call.kind), None
            )
            if other is None:
                continue
            if (call.bytes, call.dtype) != (other.bytes, other.dtype):
                ours, other_end = _Operation(rank.number, [call], []), _Operation(call.peer, [other], [])
                raise _Mismatch(
                    f"Rank {rank.number} comes with {ours}, where rank {call.peer} comes with {other_end}."
                )
            operation.open.remove(call)
            theirs[0].open.remove(other)
            self.met.messages += 1
            moved = True
            if not theirs[0].open:
                self._end(communicator, theirs[0])
        if not operation.open and not operation.ended:
            self._end(communicator, operation)
            moved = True
        return moved

    def _end(self, communicator: Communicator, operation: _Operation) -> None:
        operation.ended = True
        stream = self.ranks[operation.rank].streams[communicator]
        assert stream[0] is operation
        stream.popleft()

    # --- what went wrong --------------------------------------------------------------------------------------------

    def _stuck(self) -> str | None:
        """Who waits for whom, from the rank that is behind; None where all came to their end."""
        behind = [rank for rank in self.ranks.values() if not rank.done]
        if not behind:
            left = next(
                (stream[0] for rank in self.ranks.values() for stream in rank.streams.values() if stream), None
            )
            return None if left is None else f"Nobody meets rank {left.rank}'s {left}."
        told, rank, seen = [], behind[0], set()
        while rank.number not in seen:
            seen.add(rank.number)
            waits_for = self._waits_for(rank)
            if waits_for is None:
                told.append(f"rank {rank.number} has come to its end")
                break
            what, number = waits_for
            told.append(f"rank {rank.number} waits for rank {number} at {what}")
            rank = self.ranks[number]
        return "The ranks wait for each other: " + "; ".join(told) + "."

    def _waits_for(self, rank: _Rank) -> tuple[str, int] | None:
        """What the rank stands at, and which other rank it waits for."""
        for communicator, stream in self._waited(rank):
            operation = stream[0]
            first = operation.calls[0]
            if first.is_message:
                return str(operation), next(call.peer for call in operation.open or [first])  # type: ignore[return-value]
            for number in sorted(self._members(rank.number, first) - {rank.number}):
                theirs = self.ranks[number].streams.get(communicator)
                if not theirs or not theirs[0].started or theirs[0].calls[0].is_message:
                    return str(operation), number
        if rank.host < len(rank.log.events) and rank.log.events[rank.host][0] == "call":
            call = rank.log.calls[rank.log.events[rank.host][1]]
            missing = self._members(rank.number, call) - self.arrived[_communicator(rank.number, call)]
            if missing:
                return f"its first {_Operation(rank.number, [call], [])}", min(missing)
        return None

    def _waited(self, rank: _Rank) -> Iterator[tuple[Communicator, deque[_Operation]]]:
        """The streams that hold the rank up: first the one whose call it waits for."""
        for place in (rank.compute, rank.host):
            if place < len(rank.log.events) and rank.log.events[place][0] == "wait":
                operation = rank.operations.get(rank.log.events[place][1])
                if operation is not None and not operation.ended:
                    communicator = _communicator(rank.number, operation.calls[0])
                    yield communicator, rank.streams[communicator]
        yield from ((communicator, stream) for communicator, stream in rank.streams.items() if stream and rank.done)


def _on_device(call: Call) -> bool:
    return call.device == "cuda"


def _is_pair(call: Call) -> bool:
    return call.is_message and call.batch is None


def _communicator(rank: int, call: Call) -> Communicator:
    if _is_pair(call):
        assert call.peer is not None
        return (call.device, call.group, min(rank, call.peer), max(rank, call.peer))
    return (call.device, call.group)


def _what(call: Call) -> tuple[object, ...]:
    """What all ranks of a collective must agree on."""
    return (call.kind, call.bytes, call.dtype, call.peer, call.ranks)


def _named(call: Call) -> str:
    return f"group {call.group} of {len(call.ranks)} ranks"


def _phase(call: Call) -> str:
    return call.phase if call.phase == "setup" else f"step {call.phase}"
