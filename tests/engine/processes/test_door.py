"""Who gets in to rank 0's watch, and what a stranger can do before it: real sockets on loopback."""

import selectors
import socket
import time
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastjepa.engine.processes.door import Door, hello
from fastjepa.engine.processes.rendezvous import listen
from fastjepa.engine.processes.wire import MOST_LINE, Wire, encode

DEADLY = b"[" * 100_000 + b"\n"  # a parser of JSON runs out of stack
PATIENCE_S = 11.0  # more than a stranger has


class Entrance:
    """A door of a run of four, and those who knock."""

    def __init__(self) -> None:
        self.selector = selectors.DefaultSelector()
        listener = listen("127.0.0.1")
        self.address = listener.getsockname()
        self.door = Door(listener, 4, self.selector)
        self.knocking: list[socket.socket] = []

    def knock(self, said: bytes = b"") -> socket.socket:
        self.knocking.append(socket.create_connection(self.address, 10))
        self.knocking[-1].sendall(said)
        return self.knocking[-1]

    def let_in(self, now_s: float = 0.0) -> dict[int, Wire]:
        """Who is in once everything that was sent has come."""
        found: dict[int, Wire] = {}
        for _ in range(3):
            self.selector.select(0.02)
            found |= self.door.open(now_s)
        return found

    @property
    def registered(self) -> int:
        return len(self.selector.get_map())

    def close(self) -> None:
        for one in self.knocking:
            one.close()
        self.door.close()
        self.selector.close()


@pytest.fixture
def entrance() -> Iterator[Entrance]:
    made = Entrance()
    yield made
    made.close()


def is_turned_away(connection: socket.socket) -> bool:
    connection.settimeout(10)
    try:
        return connection.recv(1) == b""
    except ConnectionResetError:  # it had said more than was read
        return True


def received(wire: Wire) -> list[dict[str, object]]:
    """All that comes until the other side ends."""
    found, deadline_s = [], time.monotonic() + 30
    while not wire.has_ended() and time.monotonic() < deadline_s:
        found += wire.receive()
    return found


def test_a_rank_with_the_token_gets_in_and_loses_nothing_it_said(entrance: Entrance) -> None:
    said = hello(entrance.door.token, 2)
    guest = entrance.knock(said[:30])
    assert entrance.let_in() == {}
    guest.sendall(said[30:] + encode({"bye": "no images"}))
    wire = entrance.let_in()[2]
    guest.close()
    assert received(wire) == [{"bye": "no images"}]
    wire.close()


@pytest.mark.parametrize(
    "said",
    [
        DEADLY,
        b'{"token": "", "rank": 1}\n' + b" " * 100,
        hello("0" * 64, 1),
        b"\xff" * 200,
        b"GET / HTTP/1.1\r\nHost: node1\r\nUser-Agent: a scanner of ports, of which there are many\r\n\r\n",
    ],
)
def test_a_stranger_is_turned_away(entrance: Entrance, said: bytes) -> None:
    stranger = entrance.knock(said)
    assert entrance.let_in() == {}
    assert is_turned_away(stranger)
    assert entrance.registered == 1
    entrance.knock(hello(entrance.door.token, 1))
    assert list(entrance.let_in()) == [1]


@given(st.binary(max_size=200))
def test_no_bytes_but_the_hello_get_in(said: bytes) -> None:
    entrance = Entrance()
    try:
        entrance.knock(said)
        entrance.selector.select(0)
        assert entrance.door.open(0.0) == {}
        entrance.door.open(PATIENCE_S)
        assert entrance.registered == 1
    finally:
        entrance.close()


@pytest.mark.parametrize("rank", [0, 4, 99_999_999])
def test_there_is_no_such_rank(entrance: Entrance, rank: int) -> None:
    stranger = entrance.knock(hello(entrance.door.token, rank))
    assert entrance.let_in() == {}
    assert is_turned_away(stranger)


def test_a_rank_gets_in_once(entrance: Entrance) -> None:
    said = hello(entrance.door.token, 3)
    first = entrance.knock(said)
    wire = entrance.let_in()[3]
    second = entrance.knock(said)
    assert entrance.let_in() == {}
    assert is_turned_away(second)
    first.sendall(encode({"moves": 1}))
    first.close()
    assert received(wire) == [{"moves": 1}]
    wire.close()


def test_strangers_who_say_nothing_do_not_stay_and_are_not_many(entrance: Entrance) -> None:
    silent = [entrance.knock() for _ in range(200)]
    assert entrance.let_in() == {}
    assert entrance.registered == 1 + 128
    entrance.knock(hello(entrance.door.token, 1))
    assert entrance.let_in() == {}  # it waits behind them
    assert list(entrance.let_in(PATIENCE_S)) == [1]
    assert all(is_turned_away(one) for one in silent[:128])
    entrance.let_in(2 * PATIENCE_S)
    assert entrance.registered == 1


def test_nobody_listens_once_all_are_in(entrance: Entrance) -> None:
    idle = entrance.knock()
    for rank in (1, 2, 3):
        entrance.knock(hello(entrance.door.token, rank))
    wires = entrance.let_in()
    assert sorted(wires) == [1, 2, 3]
    assert is_turned_away(idle)
    assert entrance.registered == 0
    with pytest.raises(ConnectionRefusedError):
        entrance.knock()
    for wire in wires.values():
        wire.close()


@pytest.mark.parametrize("said", [DEADLY, b"x" * (MOST_LINE + 1), b"{\n", b"\xff\n"])
def test_who_is_no_peer_is_heard_no_more(said: bytes) -> None:
    ours, theirs = socket.create_server(("127.0.0.1", 0)), socket.socket()
    theirs.connect(ours.getsockname())
    wire = Wire(ours.accept()[0])
    theirs.setblocking(False)
    deadline_s = time.monotonic() + 30
    while not wire.has_ended() and time.monotonic() < deadline_s:
        if said:
            said = said[theirs.send(said) :]
        assert wire.receive() == []
    assert wire.has_ended()
    for one in (ours, theirs, wire):
        one.close()


MESSAGES = st.lists(st.dictionaries(st.text(max_size=5), st.integers() | st.text(max_size=20), max_size=3))


@given(MESSAGES, st.lists(st.integers(1, 40), min_size=1))
def test_messages_come_whole_however_they_are_cut(messages: list[dict[str, object]], cuts: list[int]) -> None:
    listener, theirs = socket.create_server(("127.0.0.1", 0)), socket.socket()
    theirs.connect(listener.getsockname())
    wire, found = Wire(listener.accept()[0]), list[dict[str, object]]()
    said, i = b"".join(map(encode, messages)), 0
    while said:
        piece, said = said[: cuts[i % len(cuts)]], said[cuts[i % len(cuts)] :]
        theirs.sendall(piece)
        found, i = found + wire.receive(), i + 1
    theirs.close()
    assert found + received(wire) == messages
    for one in (listener, wire):
        one.close()
