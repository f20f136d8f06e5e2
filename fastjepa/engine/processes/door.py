"""Who comes in to rank 0's watch: the other ranks of the run, each once, and nobody else.

A newcomer first says one line of fixed length, the run's token and its rank. Until that is there, nothing
else is read, and nothing at all is parsed. Once every rank is in, nobody listens any more.
"""

import contextlib
import hmac
import secrets
import selectors
import socket
from dataclasses import dataclass

from fastjepa.engine.processes.wire import Wire

_TOKEN_DIGITS, _RANK_DIGITS = 64, 8
_HELLO_BYTES = _TOKEN_DIGITS + 1 + _RANK_DIGITS + 1
_HELLO_WITHIN_S = 10.0  # a rank says it at once
_MOST_STRANGERS = 128  # at a time; who comes then waits in the kernel's queue


def hello(token: str, rank: int) -> bytes:
    """What a rank says first."""
    return f"{token} {rank:0{_RANK_DIGITS}}\n".encode()


@dataclass
class _Stranger:
    """A connection that has not said all of its hello."""

    socket: socket.socket
    until_s: float
    said: bytes = b""


class Door:
    """The socket that rank 0's watch listens on, and who stands before it.

    Args:
        listener: takes the connections.
        size: ranks of the run.
        selector: to wake on newcomers.

    Attributes:
        token: what a rank must show.
        missing: the ranks that are not in yet.
    """

    def __init__(self, listener: socket.socket, size: int, selector: selectors.BaseSelector) -> None:
        listener.setblocking(False)
        self.token = secrets.token_hex(_TOKEN_DIGITS // 2)
        self._listener, self._selector = listener, selector
        self.missing = set(range(1, size))
        self._strangers: list[_Stranger] = []
        selector.register(listener, selectors.EVENT_READ)

    def open(self, now_s: float) -> dict[int, Wire]:
        """Let in, by rank, who has shown the token since the last time; turn away who has not in time."""
        found: dict[int, Wire] = {}
        if not self.missing:
            return found
        self._accept(now_s)
        staying = []
        for stranger in self._strangers:
            if not _listen(stranger) or (len(stranger.said) < _HELLO_BYTES and now_s >= stranger.until_s):
                self._turn_away(stranger)
            elif len(stranger.said) < _HELLO_BYTES:
                staying.append(stranger)
            elif (rank := self._rank_of(stranger.said)) is None:
                self._turn_away(stranger)
            else:
                self._selector.unregister(stranger.socket)
                self.missing.remove(rank)
                found[rank] = Wire(stranger.socket)
        self._strangers = staying
        if not self.missing:
            self._selector.unregister(self._listener)
            for stranger in staying:
                self._turn_away(stranger)
            self.close()
        return found

    def close(self) -> None:
        """Also in a child that was forked, where the selector is its parent's too."""
        self._listener.close()
        for stranger in self._strangers:
            stranger.socket.close()
        self._strangers = []

    def _accept(self, now_s: float) -> None:
        # Without a descriptor left it is tried again, when a stranger has gone.
        with contextlib.suppress(OSError):
            while len(self._strangers) < _MOST_STRANGERS:
                connection = self._listener.accept()[0]
                connection.setblocking(False)
                self._strangers.append(_Stranger(connection, now_s + _HELLO_WITHIN_S))
                self._selector.register(connection, selectors.EVENT_READ)

    def _rank_of(self, said: bytes) -> int | None:
        """The rank that may come in with these words, or None."""
        if not hmac.compare_digest(said[:_TOKEN_DIGITS], self.token.encode()):
            return None
        digits = said[_TOKEN_DIGITS + 1 : -1]
        rank = int(digits) if digits.isdigit() else 0
        return rank if rank in self.missing and said == hello(self.token, rank) else None

    def _turn_away(self, stranger: _Stranger) -> None:
        self._selector.unregister(stranger.socket)
        stranger.socket.close()


def _listen(stranger: _Stranger) -> bool:
    """Take in what it has said of its hello, and no byte more; whether it is still there."""
    try:
        chunk = stranger.socket.recv(_HELLO_BYTES - len(stranger.said))
    except BlockingIOError:
        return True
    except OSError:
        return False
    stranger.said += chunk
    return bool(chunk)
