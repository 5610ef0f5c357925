"""The rehearsed ranks of a run: forked processes that answer each other's collectives of objects.

All of them are started, so many at a time as there are ``jobs``; one that waits for another's objects makes room.
"""

from __future__ import annotations

import gc
import importlib
import multiprocessing
import multiprocessing.connection
import os
import pickle
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from nemo_pre.launch.ranks import RankFailure
from nemo_pre.orphans import forked_processes_die_with_their_parent
from nemo_pre.rehearsal.calls import NUMBERS
from nemo_pre.rehearsal.found import Found, Order
from nemo_pre.rehearsal.places import answers, representatives

ENTRY = "nemo_pre.rehearsal.rank:rehearse"
TRACEBACK_LIMIT = 20_000  # characters

Progress = Callable[[Order, str], None]


@dataclass
class _Member:
    order: Order
    process: Any = None
    connection: Any = None
    asks: tuple[tuple[int, ...], str] | None = None  # the collective of objects that it waits in: its ranks, its name
    said: Any = None
    past: set[Any] = field(default_factory=set)  # the collectives of objects that it has left
    found: Found | None = None


@dataclass
class Crew:
    """The ranks of one rehearsal.

    Args:
        orders: one for each rank; all of one run.
        jobs: ranks that compute at a time.
        entry: ``"module:function"`` that a rank's process calls.
    """

    orders: Sequence[Order]
    jobs: int = 1
    entry: str = ENTRY
    progress: Progress = lambda order, what: None
    _members: list[_Member] = field(default_factory=list)
    _said: dict[Any, dict[int, Any]] = field(default_factory=dict)  # by collective of objects and rank

    def run(self) -> list[Found]:
        """What the ranks found, in the order of ``orders``.

        Raises:
            RankFailure: one raised, or was ended, or waits for objects of one that has come to its end.
        """
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["nemo_pre.rehearsal.preload"])
        self._members = [_Member(order) for order in self.orders]
        try:
            while any(member.found is None for member in self._members):
                self._start_more(context)
                self._listen()
                self._answer()
        finally:
            self._end()
        return [member.found for member in self._members if member.found is not None]

    # --- starting and ending ----------------------------------------------------------------------------------------

    @property
    def _busy(self) -> int:
        return sum(m.process is not None and m.found is None and m.asks is None for m in self._members)

    def _start_more(self, context: Any) -> None:
        for member in self._members:
            if member.process is None and self._busy < self.jobs and not self._answerable():
                ours, theirs = context.Pipe()
                process = context.Process(target=_main, args=(self.entry, member.order, theirs), daemon=True)
                process.start()
                theirs.close()
                member.process, member.connection = process, ours

    def _end(self) -> None:
        for member in self._members:
            if member.process is not None:
                member.connection.close()
                if member.found is None:
                    member.process.kill()
                member.process.join()

    # --- listening --------------------------------------------------------------------------------------------------

    def _listen(self) -> None:
        """Take one message of every rank that has one, waiting for the first."""
        speaking: dict[Any, _Member] = {
            m.connection: m for m in self._members if m.process is not None and m.found is None
        }
        busy = [connection for connection, member in speaking.items() if member.asks is None]
        if not busy:
            return
        for ready in multiprocessing.connection.wait(busy):
            member = speaking[ready]
            try:
                kind, *content = member.connection.recv()
            except (EOFError, ConnectionResetError):
                member.process.join()
                code = member.process.exitcode
                how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"
                raise RankFailure(f"{self._name(member)} {how}.") from None
            if kind == "progress":
                self.progress(member.order, *content)
            elif kind == "objects":
                ranks, name, said = content
                member.asks, member.said = (ranks, name), said
            elif kind == "found":
                member.found = pickle.loads(content[0])
                self.progress(member.order, "done")
            else:
                sentence, trace = content
                raise RankFailure(f"{self._name(member)}: {sentence}", trace)

    def _name(self, member: _Member) -> str:
        return f"Rank {member.order.rank} ({member.order.place})"

    # --- objects ----------------------------------------------------------------------------------------------------

    def _answerable(self) -> list[_Member]:
        """The members that wait in a collective in which all its rehearsed ranks have come."""
        ranks = {member.order.rank: member for member in self._members}
        ready = []
        for member in self._members:
            if member.asks is not None:
                inside = [ranks[rank] for rank in member.asks[0] if rank in ranks]
                if all(other.asks == member.asks or member.asks in other.past for other in inside):
                    ready.append(member)
        return ready

    def _answer(self) -> None:
        ready = self._answerable()
        if not ready:
            self._refuse_waiting_for_ever()
            return
        config = self.orders[0].config
        speakers = representatives(config, [member.order.place for member in self._members])
        for member in ready:
            if self._busy >= self.jobs:
                return
            assert member.asks is not None
            said = self._said.setdefault(member.asks, {})
            for other in self._members:
                if other.asks == member.asks:
                    said[other.order.rank] = other.said
            ranks, name = member.asks
            found = answers(config.parallel, ranks, speakers, said, numbers=name.startswith(NUMBERS))
            member.past.add(member.asks)
            member.asks = member.said = None
            member.connection.send(found)

    def _refuse_waiting_for_ever(self) -> None:
        waiting = [member for member in self._members if member.asks is not None]
        if waiting and self._busy == 0 and all(member.process is not None for member in self._members):
            member = waiting[0]
            assert member.asks is not None
            ranks = {other.order.rank: other for other in self._members}
            missing = next(rank for rank in member.asks[0] if rank in ranks and ranks[rank].asks != member.asks)
            other = ranks[missing]
            where = "has come to its end" if other.asks is None else f"waits in {_called(other.asks)}"
            raise RankFailure(f"{self._name(member)} waits in {_called(member.asks)}, while rank {missing} {where}.")


def _called(asks: tuple[tuple[int, ...], str]) -> str:
    name, _, number = asks[1].rpartition(" ")
    return f"{name} number {number} of {len(asks[0])} ranks"


# --- a rank's process -----------------------------------------------------------------------------------------------


def _main(entry: str, order: Order, connection: Any) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent, which ends its ranks
    forked_processes_die_with_their_parent()
    lock = threading.Lock()

    def send(*message: Any) -> None:
        with lock:
            connection.send(message)

    def exchange(name: str, mine: Any, ranks: Sequence[int]) -> list[Any]:
        send("objects", tuple(ranks), name, mine)
        return connection.recv()

    try:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
        os.environ.setdefault("OMP_NUM_THREADS", "1")
        _be_silent()
        gc.freeze()  # what the server imported is no garbage, and takes seconds to look through
        module, _, function = entry.partition(":")
        found = getattr(importlib.import_module(module), function)(
            order, exchange, lambda what: send("progress", what)
        )
        send("found", pickle.dumps(found))
    except (BrokenPipeError, EOFError):  # the parent is gone
        os._exit(1)
    except BaseException as error:
        sentence = f"{type(error).__name__}: {_first_sentence(error)}"
        send("failed", sentence, traceback.format_exc()[-TRACEBACK_LIMIT:])
    sys.stdout.flush()
    os._exit(0)  # threads of autograd and of libraries would be waited for


def _be_silent() -> None:
    """What libraries print of a rehearsed rank would hide the table; errors are sent."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for descriptor in (1, 2):
        os.dup2(nowhere, descriptor)


def _first_sentence(error: BaseException) -> str:
    lines: Iterable[str] = (line.strip() for line in str(error).splitlines())
    return next((line for line in lines if line), "no message")[:1000]
