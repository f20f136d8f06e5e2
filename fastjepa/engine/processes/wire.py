"""Messages between processes as lines of JSON, over a socket that never keeps its thread waiting."""

import json
import socket
from typing import Any

_MOST_BYTES = 1 << 20  # of one side's backlog: nothing said here is long, so it is no peer of ours


class Wire:
    """One end of a connection."""

    def __init__(self, connection: socket.socket) -> None:
        connection.setblocking(False)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.socket = connection
        self._ended = False
        self._in, self._out = b"", b""

    def send(self, message: dict[str, Any]) -> None:
        """Send it, now or with the next message: a cut network takes nothing."""
        if self._ended or len(self._out) > _MOST_BYTES:
            return
        self._out += json.dumps(message).encode() + b"\n"
        try:
            self._out = self._out[self.socket.send(self._out) :]
        except BlockingIOError:
            pass
        except OSError:
            self._out = b""  # what the other side said before it ended may still be read

    def receive(self) -> list[dict[str, Any]]:
        """What has come; `has_ended` is true once nothing more will."""
        try:
            while not self._ended and (chunk := self.socket.recv(1 << 16)):
                self._in += chunk
                if len(self._in) > _MOST_BYTES:
                    break
            self._ended = True
        except BlockingIOError:
            pass
        except OSError:
            self._ended = True
        *lines, self._in = self._in.split(b"\n")
        try:
            messages = [json.loads(line) for line in lines]
        except ValueError:
            self._ended = True
            return []
        return [message for message in messages if isinstance(message, dict)]

    def has_ended(self) -> bool:
        """Whether the other side has closed it, or is no peer."""
        return self._ended

    def close(self) -> None:
        self._ended = True
        self.socket.close()
