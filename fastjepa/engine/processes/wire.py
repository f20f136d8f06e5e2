"""Messages between processes as lines of JSON, over a socket that never keeps its thread waiting."""

import json
import socket
from typing import Any

_MOST_BACKLOG = 1 << 20  # bytes that the other side may be behind: then it hears of nothing more
MOST_LINE = 1 << 18  # bytes of a message: a verdict on 30,000 ranks
_CHUNK = 1 << 16


def encode(message: dict[str, Any]) -> bytes:
    """As a line, which may be sent to many."""
    return json.dumps(message).encode() + b"\n"


class Wire:
    """One end of a connection to a rank that has shown the token, or to rank 0."""

    def __init__(self, connection: socket.socket) -> None:
        connection.setblocking(False)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.socket = connection
        self._ended = False
        self._in, self._out = b"", b""

    def send(self, line: bytes) -> None:
        """Send it, now or with the next one: a cut network takes nothing."""
        if self._ended or len(self._out) > _MOST_BACKLOG:
            return
        self._out += line
        try:
            self._out = self._out[self.socket.send(self._out) :]
        except BlockingIOError:
            pass
        except OSError:
            self._out = b""  # what the other side said before it ended may still be read

    def receive(self) -> list[dict[str, Any]]:
        """What has come, of at most 64 KiB; whoever waits for the socket is woken for the rest.

        `has_ended` is true once nothing more will.
        """
        if self._ended:
            return []
        try:
            chunk = self.socket.recv(_CHUNK)
            self._ended = not chunk
        except BlockingIOError:
            return []
        except OSError:
            self._ended = True
            return []
        *lines, self._in = (self._in + chunk).split(b"\n")
        if len(self._in) > MOST_LINE:  # no peer says so much
            self._ended = True
        try:
            messages = [json.loads(line) for line in lines]
        except (ValueError, RecursionError):
            self._ended = True
            return []
        return [message for message in messages if isinstance(message, dict)]

    def has_ended(self) -> bool:
        """Whether the other side has closed it, or is no peer."""
        return self._ended

    def close(self) -> None:
        self._ended = True
        self.socket.close()
