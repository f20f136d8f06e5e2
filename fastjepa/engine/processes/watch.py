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
import selectors
import socket
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import asdict
from datetime import timedelta
from typing import Any, NoReturn

import torch.distributed as dist

from fastjepa.config import ConfigError
from fastjepa.engine.processes.activity import Activity, Doing, Moment
from fastjepa.engine.processes.door import Door, hello
from fastjepa.engine.processes.rendezvous import Meeting, listen
from fastjepa.engine.processes.verdicts import Peer, Verdict, ended, failed, silent, stuck
from fastjepa.engine.processes.wire import Wire, encode

_BEAT_S = 1.0
_WAKES_PER_BEAT = 20  # at most, however many ranks speak: what has come meanwhile is read in one go
_GRACE_S = 30.0  # for ranks that hear of another's failure at a step boundary, save, and end by themselves
_STARTING_GRACE_S = 3.0  # for those that have nothing to save
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
        self._selector = selectors.DefaultSelector()
        # On a clock that hardly moves while this thread itself is held up: the others are not to blame.
        self._now_s = 0.0
        self._beat_s = min(_BEAT_S, dead_after_s / 5)
        self._farewell: dict[str, Any] | None = None
        self._leave_by_s = 0.0
        self._asked = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)

    def start(self) -> None:
        # A loader worker that kept them would keep this rank's connections open after its death.
        os.register_at_fork(after_in_child=self._close)
        self._thread.start()

    def leave(self, failure: str = "") -> None:
        """Say goodbye to the other ranks, and why, if it is because of a failure."""
        self._leave_by_s = time.monotonic() + _FAREWELL_S
        self._farewell = {"bye": failure}
        self._thread.join(_FAREWELL_S + self._beat_s)
        if failure:  # a communicator that others have left may never be taken down
            last = threading.Timer(_GRACE_S, os._exit, (LOST,))
            last.daemon = True
            last.start()

    def explain(self) -> None:
        """After a collective failed: wait for the verdict, which ends this process. Returns if none comes."""
        self._asked.set()
        self._thread.join(self.dead_after_s + 5 * self._beat_s)

    @abstractmethod
    def _hear(self, ranks: Iterable[int]) -> Verdict | None:
        """Take in what has come from these ranks."""

    @abstractmethod
    def _judge(self) -> Verdict | None:
        """Think of those that were not heard."""

    @abstractmethod
    def _tell(self, line: bytes) -> None:
        """Send to whom this rank sends."""

    @abstractmethod
    def _pronounce(self, verdict: Verdict) -> None:
        """Tell it to those for whom this rank judges."""

    @abstractmethod
    def _close(self) -> None:
        """What is open, in a forked child. The selector's list is the parent's too: it is left as it is."""

    @property
    def _is_over(self) -> bool:
        return False

    @property
    def _reaches_all(self) -> bool:
        """Whether all that this rank speaks to are there: else its farewell waits a little."""
        return True

    def _run(self) -> None:
        try:
            self._look_around()
        except Exception as error:  # without a watch, this rank might wait for ever
            end_process(f"the watch over the other ranks failed: {error!r}")

    def _look_around(self) -> None:
        own, last_s, due_s = self.peers[self.rank], time.monotonic(), 0.0
        while not self._is_over:
            ready = self._selector.select(self._beat_s / 4)
            at_s = time.monotonic()
            self._now_s += min(at_s - last_s, 2 * self._beat_s)
            # Rank 0 bears with a rank that starts for longer, so it hears at once when one has.
            has_started = own.moment.doing == Doing.STARTING != self.activity.now.doing
            last_s, is_due = at_s, self._now_s >= due_s or has_started
            if is_due:
                due_s = self._now_s + self._beat_s
                own.hear(self._now_s, self.activity.now, *self.activity.place())
            verdict = self._hear(key.data for key, _ in ready if key.data is not None)
            verdict = verdict or (self._judge() if is_due else None)
            if verdict is not None:
                self._give_up(verdict)
            if self._farewell is not None and (self._reaches_all or at_s >= self._leave_by_s):
                self._tell(encode(self._farewell))
                return
            if is_due:
                said = asdict(own.moment) | {"place": own.place, "in_collective": own.in_collective}
                self._tell(encode(said))
            if ready:
                time.sleep(self._beat_s / _WAKES_PER_BEAT)

    def _note(self, peer: Peer, message: dict[str, Any]) -> None:
        moment = Moment(message["step"], Doing(message["doing"]), message["moves"])
        peer.hear(self._now_s, moment, message["place"], message["in_collective"])

    def _give_up(self, verdict: Verdict) -> None:
        """End this process, unless its main thread does so in time."""
        self._pronounce(verdict)
        is_starting = self.activity.now.doing == Doing.STARTING
        grace_s = min(verdict.grace_s, _STARTING_GRACE_S) if is_starting else verdict.grace_s
        deadline_s = time.monotonic() + grace_s
        while time.monotonic() < deadline_s and not self._asked.wait(0.05):
            if self._farewell is not None:
                return
        if verdict.hangs and self.rank in verdict.ranks:
            faulthandler.dump_traceback(2)
        end_process(f"{verdict.text} {self.activity.where_to_go_on()}")

    def _read_from(self, wire: Wire, rank: int) -> None:
        """Wake for it. `_hear` gets the rank."""
        self.peers[rank].met, self.peers[rank].heard_s = True, self._now_s
        self._selector.register(wire.socket, selectors.EVENT_READ, rank)


class Host(Watch):
    """Rank 0's part: hears all, judges all, tells all."""

    def __init__(
        self, meeting: Meeting, activity: Activity, dead_after_s: float, hang_after_s: float
    ) -> None:
        super().__init__(0, meeting, activity, dead_after_s, hang_after_s)
        self._wires: dict[int, Wire] = {}
        try:
            listener = listen(meeting.address)
        except OSError as error:
            raise ConfigError(f"rank 0's watch cannot listen on {meeting.address}: {error}") from error
        address, port = listener.getsockname()[:2]
        self._door = Door(listener, len(self.peers), self._selector)
        meeting.store.set("watch", json.dumps([address, port, self._door.token]))

    def _hear(self, ranks: Iterable[int]) -> Verdict | None:
        gone: Peer | None = None
        for rank in ranks:
            peer, wire = self.peers[rank], self._wires[rank]
            for message in wire.receive():
                if "moves" in message:
                    self._note(peer, message)
                elif "bye" in message:
                    peer.left = True
                    if message["bye"]:
                        return failed(peer, message["bye"], _GRACE_S)
            if wire.has_ended():
                self._selector.unregister(wire.socket)
                gone = gone if gone or peer.left else peer
        for rank, wire in self._door.open(self._now_s).items():
            self._wires[rank] = wire
            self._read_from(wire, rank)
        # Of ranks that end together, one that says why is better to know.
        return None if gone is None else ended(gone)

    def _judge(self) -> Verdict | None:
        now_s = self._now_s
        return silent(self.peers, now_s, self.dead_after_s) or stuck(self.peers, now_s, self.hang_after_s)

    def _tell(self, line: bytes) -> None:
        for wire in self._wires.values():
            wire.send(line)

    def _pronounce(self, verdict: Verdict) -> None:
        self._tell(encode({"verdict": asdict(verdict)}))

    @property
    def _reaches_all(self) -> bool:
        return not self._door.missing

    def _close(self) -> None:
        self._selector.close()
        self._door.close()
        for wire in self._wires.values():
            wire.close()


class Guest(Watch):
    """Any other rank's part: tells rank 0, and judges it alone.

    Raises:
        ConfigError: rank 0's watch cannot be reached.
    """

    def __init__(
        self, rank: int, meeting: Meeting, activity: Activity, dead_after_s: float, hang_after_s: float
    ) -> None:
        super().__init__(rank, meeting, activity, dead_after_s, hang_after_s)
        self._wire = self._connect(meeting, within_s=max(dead_after_s, 10))
        self._main_left = False
        self._read_from(self._wire, 0)

    def _connect(self, meeting: Meeting, within_s: float) -> Wire:
        me = meeting.members[self.rank]
        try:
            meeting.store.wait(["watch"], timedelta(seconds=within_s))
            address, port, token = json.loads(meeting.store.get("watch"))
        except dist.DistError as error:
            why = str(error).splitlines()[0]
            raise ConfigError(f"{me}: rank 0 did not say where its watch listens ({why})") from error
        try:
            connection = socket.create_connection((address, port), within_s)
            connection.sendall(hello(token, self.rank))
        except OSError as error:
            raise ConfigError(
                f"{me} cannot reach the watch of rank 0 at {address}:{port} ({error}). That is the address "
                "by which the host of rank 0 reaches MASTER_ADDR, and a port that the system chose: does it "
                "lead there from here, and are all ports open between the hosts?"
            ) from error
        return Wire(connection)

    def _hear(self, ranks: Iterable[int]) -> Verdict | None:
        for main in (self.peers[rank] for rank in ranks):
            for message in self._wire.receive():
                if "moves" in message:
                    self._note(main, message)
                elif "verdict" in message:
                    return Verdict(**message["verdict"])
                elif message.get("bye"):
                    return failed(main, message["bye"], _GRACE_S)
                elif "bye" in message:
                    self._main_left = True
            if self._wire.has_ended() and not self._main_left:
                return ended(main)
        return None

    def _judge(self) -> Verdict | None:
        return silent(self.peers[:1], self._now_s, self.dead_after_s)

    def _tell(self, line: bytes) -> None:
        self._wire.send(line)

    def _pronounce(self, verdict: Verdict) -> None:
        del verdict  # rank 0 comes to its own

    @property
    def _is_over(self) -> bool:
        return self._main_left

    def _close(self) -> None:
        self._selector.close()
        self._wire.close()


def end_process(why: str) -> NoReturn:
    """End now, loader workers first. The main thread may hold any lock, so nothing of Python's is flushed."""
    os.write(2, f"error: {why.strip()}\n".encode())
    with contextlib.suppress(Exception):
        for child in multiprocessing.active_children():
            child.kill()
    os._exit(LOST)
