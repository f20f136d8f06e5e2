"""Rank 0's watch over very many ranks, and before strangers: it is real and has a process of its own."""

import contextlib
import json
import multiprocessing
import os
import resource
import socket
import sys
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import pytest
import torch.distributed as dist

from fastjepa.config import ConfigError
from fastjepa.engine.processes import watch as module
from fastjepa.engine.processes.activity import Activity, Doing
from fastjepa.engine.processes.door import hello
from fastjepa.engine.processes.files import allow_files, files_needed
from fastjepa.engine.processes.rendezvous import Meeting, Member
from fastjepa.engine.processes.watch import Guest, Host
from fastjepa.engine.processes.wire import Wire, encode
from tests.ranks import free_port

MANY, BEATS = 1024, 3
LIMIT_S = 600.0

linux = pytest.mark.skipif(sys.platform != "linux", reason="forks")


def counted(counts: dict[str, int], name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    def count(*arguments: Any) -> Any:
        counts[name] = counts.get(name, 0) + 1
        return function(*arguments)

    return count


def stand(size: int, ours: Connection) -> None:
    """Be rank 0 until all others have said goodbye; tell what that took."""
    counts: dict[str, int] = {}
    Wire.receive = counted(counts, "receive", Wire.receive)  # type: ignore[method-assign]
    module.stuck = counted(counts, "judge", module.stuck)
    store = dist.HashStore()
    members = tuple(Member(rank, "node", rank) for rank in range(size))
    host = Host(Meeting(store, members, "127.0.0.1"), Activity(), LIMIT_S, LIMIT_S)
    began_s = time.monotonic()
    host.start()
    ours.send(json.loads(store.get("watch")))
    while not all(peer.left for peer in host.peers[1:]):
        time.sleep(0.01)
    seconds = time.monotonic() - began_s
    steps = [peer.moment.step for peer in host.peers[1:]]
    host.leave()
    ours.send((counts, seconds, steps))
    ours.recv()
    os._exit(0)


class Standing:
    def __init__(self, size: int) -> None:
        forked = multiprocessing.get_context("fork")
        self.pipe, theirs = forked.Pipe()
        self.process = forked.Process(target=stand, args=(size, theirs), daemon=True)
        self.process.start()
        theirs.close()
        self.address, self.port, self.token = self.pipe.recv()

    def connect(self, said: bytes) -> socket.socket:
        connection = socket.create_connection((self.address, self.port), 30)
        connection.sendall(said)
        return connection

    def end(self) -> int | None:
        self.pipe.send("end")
        self.process.join(30)
        return self.process.exitcode


def beat(step: int) -> bytes:
    return encode(
        {"step": step, "doing": Doing.COMPUTING, "moves": step, "place": "here", "in_collective": False}
    )


@linux
def test_the_work_of_watching_many_is_what_they_say() -> None:
    """Each of N beats once a second: N messages are read, and N ranks are judged once."""
    allow_files(MANY)
    standing = Standing(MANY)
    guests = [standing.connect(hello(standing.token, rank)) for rank in range(1, MANY)]
    for step in range(1, BEATS + 1):
        for i, guest in enumerate(guests):
            guest.sendall(beat(step))
            time.sleep(0.02 * (i % 64 == 0))  # not all at once
    for guest in guests:
        guest.sendall(encode({"bye": ""}))
    counts, seconds, steps = standing.pipe.recv()
    assert steps == [BEATS] * (MANY - 1)
    assert counts["receive"] <= len(guests) * (BEATS + 1)  # a read for each message at most
    assert counts["judge"] <= seconds + 2  # once a beat, which is a second
    for guest in guests:
        guest.close()
    assert standing.end() == 0


@linux
def test_a_stranger_does_not_end_the_run() -> None:
    standing = Standing(2)
    stranger = standing.connect(b"[" * 100_000 + b"\n")
    stranger.settimeout(30)
    with contextlib.suppress(ConnectionResetError):
        assert stranger.recv(1) == b""
    guest = standing.connect(hello(standing.token, 1) + beat(1) + encode({"bye": ""}))
    assert standing.pipe.recv()[2] == [1]
    assert standing.end() == 0
    stranger.close()
    guest.close()


def limits(soft: int, hard: int, size: int, pipe: Connection) -> None:
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    try:
        allow_files(size)
        pipe.send(resource.getrlimit(resource.RLIMIT_NOFILE))
    except ConfigError as error:
        pipe.send(str(error))


@linux
@pytest.mark.parametrize(("hard", "is_enough"), [(files_needed(MANY), True), (files_needed(MANY) - 1, False)])
def test_as_many_files_as_a_run_needs(hard: int, is_enough: bool) -> None:
    forked = multiprocessing.get_context("fork")
    ours, theirs = forked.Pipe()
    process = forked.Process(target=limits, args=(1024, hard, MANY, theirs))
    process.start()
    told = ours.recv()
    process.join(30)
    if is_enough:
        assert told == (hard, hard)
    else:
        assert told.startswith(f"a run of 1024 ranks needs up to {hard + 1} open files")
        assert f"`ulimit -n {hard + 1}`" in told


def test_a_watch_that_cannot_be_reached_is_named() -> None:
    store, port = dist.HashStore(), free_port()
    store.set("watch", json.dumps(["127.0.0.1", port, "0" * 64]))
    members = (Member(0, "node0", 1), Member(1, "node1", 2))
    with pytest.raises(
        ConfigError, match=f"rank 1 .node1, process 2. cannot reach.*127.0.0.1:{port} .*refused"
    ):
        Guest(1, Meeting(store, members, "127.0.0.1"), Activity(), LIMIT_S, LIMIT_S)
    tcp = dist.TCPStore("127.0.0.1", port, 1, is_master=True, wait_for_workers=False)
    client = dist.TCPStore("127.0.0.1", port, 1, is_master=False, wait_for_workers=False)
    del tcp
    with pytest.raises(ConfigError, match="rank 0 did not say where its watch listens"):
        Guest(1, Meeting(client, members, "127.0.0.1"), Activity(), LIMIT_S, LIMIT_S)
