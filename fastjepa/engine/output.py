"""Output for a person: what cannot be written costs the output, and never the run."""

import os
import sys
from contextlib import suppress
from typing import TextIO

MOST_WAITING = 65_536  # bytes: some hundred lines


class Output:
    """A text stream that a console can write to, and that does not fail.

    What a full disk does not take waits; of more than `MOST_WAITING` bytes the newest texts are left out.
    Once there is room, the rest of a line that was cut off comes first. Where the reader of a pipe has gone,
    output goes nowhere from then on, that of others too. What the encoding lacks is written as an escape.

    Args:
        stream: standard output, standard error, or any other; None where the process was started without it.
    """

    def __init__(self, stream: TextIO | None) -> None:
        self._stream = stream
        self._waiting = b""
        self.encoding = getattr(stream, "encoding", None) or "utf-8"

    def write(self, text: str) -> int:
        """Take a text; `flush` writes it."""
        if len(self._waiting) < MOST_WAITING:
            self._waiting += text.encode(self.encoding, "backslashreplace")
        return len(text)

    def flush(self) -> None:
        if self._stream is None:
            self._waiting = b""
            return
        try:
            self._write_out(self._stream)
        except BrokenPipeError:
            self._waiting = b""
            silence(self._stream)
        except OSError:  # what is left waits
            pass

    def _write_out(self, stream: TextIO) -> None:
        try:
            descriptor = stream.fileno()
        except OSError:  # it is in memory
            stream.write(self._waiting.decode(self.encoding))
            self._waiting = b""
            return
        with suppress(OSError):
            stream.flush()  # what others have printed comes first
        # Not by the stream, which would keep what it cannot write, and fail of it once more at exit.
        while self._waiting:
            self._waiting = self._waiting[os.write(descriptor, self._waiting) :]

    def isatty(self) -> bool:
        return self._stream is not None and self._stream.isatty()


def tell(text: str, stream: TextIO | None) -> None:
    """Print a line."""
    output = Output(stream)
    output.write(f"{text}\n")
    output.flush()


def silence(stream: TextIO) -> None:
    """From now on, what anything writes to the file of a stream goes nowhere; what waits in it too."""
    with suppress(OSError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)
        stream.flush()


def settle() -> None:
    """For the end of a process: what libraries printed and nothing takes shall not change its exit status."""
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:
            try:
                stream.flush()
            except OSError:
                silence(stream)
