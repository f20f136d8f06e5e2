"""No process of a run outlives, or waits for ever for, another that died or hangs.

Every rank has a thread that tells rank 0 once a second what its main thread is doing, over a connection of
their own, and hears the same of rank 0. Rank 0 judges all of them (see `verdicts`), the others judge rank 0.
A process that is killed closes its connection, which is noticed at once; one that is stopped, or behind a cut
network, falls silent. Whoever comes to a verdict, or is told of one, prints it and ends its process, whatever
the main thread is in: a collective that waits for a lost rank cannot be interrupted otherwise.
"""

import contextlib
import faulthandler
import json
import multiprocessing
import os
import secrets
import selectors
import socket
import threading
import time
from abc import ABC, abstractmethod
from dataclasses import asdict
from datetime import timedelta
from typing import Any, NoReturn

from fastjepa.engine.processes.activity import Activity, Doing, Moment
from fastjepa.engine.processes.rendezvous import Meeting, listen
from fastjepa.engine.processes.verdicts import Peer, Verdict, ended, failed, silent, stuck
from fastjepa.engine.processes.wire import Wire

_BEAT_S = 1.0
_GRACE_S = 30.0  # for ranks that hear of another's failure at a step boundary, save, and end by themselves
_FAREWELL_S = 2.0
LOST = 1  # exit status


class Watch(ABC):
    """One rank's part in it.

    Args:
        rank: this one.
        meeting: all of them.
        activity: what this rank's main thread is doing.
        dead_after_s: a rank not heard from for so long is lost.
        hang_after_s: so is one that does not go on for so long; saving and judging may take longer.
    """

    def __init__(
        self, rank: int, meeting: Meeting, activity: Activity, dead_after_s: float, hang_after_s: float
    ) -> None:
        self.rank, self.activity = rank, activity
        self.dead_after_s, self.hang_after_s = dead_after_s, hang_after_s
        self.peers = [Peer(member) for member in meeting.members]
        self._beat_s = min(_BEAT_S, dead_after_s / 5)
        self._farewell: dict[str, Any] | None = None
        self._asked = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)
        # A loader worker that kept them would keep this rank's connections open after its death.
        os.register_at_fork(after_in_child=self._close)

    def start(self) -> None:
        self._thread.start()

    def leave(self, failure: str = "") -> None:
        """Say goodbye to the other ranks, and why, if it is because of a failure."""
        self._farewell = {"bye": failure}
        self._thread.join(_FAREWELL_S)
        if failure:  # a communicator that others have left may never be taken down
            last = threading.Timer(_GRACE_S, os._exit, (LOST,))
            last.daemon = True
            last.start()

    def explain(self) -> None:
        """After a collective failed: wait for the verdict, which ends this process. Returns if none comes."""
        self._asked.set()
        self._thread.join(self.dead_after_s + 5 * self._beat_s)

    @abstractmethod
    def _sockets(self) -> list[socket.socket]:
        """What to read from."""

    @abstractmethod
    def _hear(self) -> Verdict | None:
        """Take in what has come."""

    @abstractmethod
    def _judge(self) -> Verdict | None:
        """Think of those that were not heard."""

    @abstractmethod
    def _tell(self, message: dict[str, Any]) -> None:
        """Send to whom this rank sends."""

    @property
    def _is_over(self) -> bool:
        return False

    def _run(self) -> None:
        try:
            self._look_around()
        except Exception as error:  # without a watch, this rank might wait for ever
            end_process(f"the watch over the other ranks failed: {error!r}")

    def _look_around(self) -> None:
        last_s, told_s = time.monotonic(), 0.0
        while not self._is_over:
            _wait_for_any(self._sockets(), self._beat_s / 4)
            now_s = time.monotonic()
            # Where this thread itself was held up, the others are not to blame.
            elapsed_s, last_s = min(now_s - last_s, 2 * self._beat_s), now_s
            for peer in self.peers:
                peer.wait(elapsed_s)
            self._note_self()
            verdict = self._hear() or self._judge()
            if verdict is not None:
                self._give_up(verdict)
            if self._farewell is not None:
                self._tell(self._farewell)
                return
            if now_s - told_s >= self._beat_s:
                told_s = now_s
                place, in_collective = self.activity.place()
                self._tell(asdict(self.activity.now) | {"place": place, "in_collective": in_collective})

    def _note_self(self) -> None:
        own = self.peers[self.rank]
        own.hear(self.activity.now, *self.activity.place())

    def _give_up(self, verdict: Verdict) -> None:
        """End this process, unless its main thread does so in time."""
        self._tell({"verdict": asdict(verdict)})
        deadline_s = time.monotonic() + verdict.grace_s
        while time.monotonic() < deadline_s and not self._asked.wait(0.05):
            if self._farewell is not None:
                return
        if verdict.hangs and self.rank in verdict.ranks:
            faulthandler.dump_traceback(2)
        end_process(f"{verdict.text} {self.activity.where_to_go_on()}")

    def _close(self) -> None:
        for connection in self._sockets():
            connection.close()


class Host(Watch):
    """Rank 0's part: hears all, judges all, tells all."""

    def __init__(
        self, meeting: Meeting, activity: Activity, dead_after_s: float, hang_after_s: float
    ) -> None:
        self._listener = listen(meeting.address)
        self._listener.setblocking(False)
        self._token = secrets.token_hex(16)
        self._wires: dict[int, Wire] = {}
        self._unknown: list[Wire] = []
        super().__init__(0, meeting, activity, dead_after_s, hang_after_s)
        address, port = self._listener.getsockname()[:2]
        meeting.store.set("watch", json.dumps([address, port, self._token]))

    def _sockets(self) -> list[socket.socket]:
        wires = [*self._wires.values(), *self._unknown]
        return [self._listener, *(wire.socket for wire in wires if not wire.has_ended())]

    def _hear(self) -> Verdict | None:
        self._welcome()
        for rank, wire in self._wires.items():
            peer = self.peers[rank]
            if peer.left or wire.has_ended():
                continue
            for message in wire.receive():
                if "moves" in message:
                    _note(peer, message)
                elif "bye" in message:
                    peer.left = True
                    if message["bye"]:
                        return failed(peer, message["bye"], _GRACE_S)
            if wire.has_ended() and not peer.left:
                return ended(peer)
        return None

    def _welcome(self) -> None:
        with contextlib.suppress(BlockingIOError):
            while True:
                self._unknown.append(Wire(self._listener.accept()[0]))
        for wire in self._unknown:
            # Whoever says anything else first is none of ours.
            for message in wire.receive()[:1]:
                if message.get("token") == self._token:
                    self._wires[int(message["rank"])] = wire
                else:
                    wire.close()
        self._unknown = [w for w in self._unknown if not w.has_ended() and w not in self._wires.values()]

    def _judge(self) -> Verdict | None:
        return silent(self.peers, self.dead_after_s) or stuck(self.peers, self.hang_after_s)

    def _tell(self, message: dict[str, Any]) -> None:
        for wire in self._wires.values():
            wire.send(message)


class Guest(Watch):
    """Any other rank's part: tells rank 0, and judges it alone."""

    def __init__(
        self, rank: int, meeting: Meeting, activity: Activity, dead_after_s: float, hang_after_s: float
    ) -> None:
        meeting.store.wait(["watch"], timedelta(seconds=max(dead_after_s, 10)))
        address, port, token = json.loads(meeting.store.get("watch"))
        self._wire = Wire(socket.create_connection((address, port), timeout=max(dead_after_s, 10)))
        self._wire.send({"token": token, "rank": rank})
        self._main_left = False
        super().__init__(rank, meeting, activity, dead_after_s, hang_after_s)

    def _sockets(self) -> list[socket.socket]:
        return [] if self._wire.has_ended() else [self._wire.socket]

    def _hear(self) -> Verdict | None:
        main = self.peers[0]
        for message in self._wire.receive():
            if "moves" in message:
                _note(main, message)
            elif "verdict" in message:
                return Verdict(**message["verdict"])
            elif message.get("bye"):
                return failed(main, message["bye"], _GRACE_S)
            elif "bye" in message:
                self._main_left = True
        return ended(main) if self._wire.has_ended() and not self._main_left else None

    def _judge(self) -> Verdict | None:
        return silent(self.peers[:1], self.dead_after_s)

    def _tell(self, message: dict[str, Any]) -> None:
        if "verdict" not in message:
            self._wire.send(message)

    @property
    def _is_over(self) -> bool:
        return self._main_left


def _wait_for_any(sockets: list[socket.socket], timeout_s: float) -> None:
    """Until one can be read from. select.select takes no descriptors above 1023."""
    with selectors.DefaultSelector() as selector:
        for one in sockets:
            selector.register(one, selectors.EVENT_READ)
        selector.select(timeout_s)


def _note(peer: Peer, message: dict[str, Any]) -> None:
    moment = Moment(message["step"], Doing(message["doing"]), message["moves"])
    peer.hear(moment, message["place"], message["in_collective"])


def end_process(why: str) -> NoReturn:
    """End now, loader workers first. The main thread may hold any lock, so nothing of Python's is flushed."""
    os.write(2, f"error: {why.strip()}\n".encode())
    with contextlib.suppress(Exception):
        for child in multiprocessing.active_children():
            child.kill()
    os._exit(LOST)
