"""How a run ends before its last step: signals only set a flag, and all ranks agree at every step."""

import signal
import time
from contextlib import suppress
from enum import IntEnum
from pathlib import Path
from types import FrameType

# Ctrl-C reaches every process of a terminal, and then launchers send it to theirs once more.
_SENT_TWICE_S = 5.0


class Call(IntEnum):
    """What a rank wants at a step boundary; the largest of all ranks counts."""

    GO_ON = 0
    SAVE_AND_STOP = 1
    GIVE_UP = 2


class StopRequest:
    """Remembers that SIGTERM, SIGUSR1 or SIGINT (Ctrl-C) came. A second Ctrl-C interrupts at once.

    Args:
        launched: by something that passes signals on: then a Ctrl-C counts as a second one only some seconds
            after the first.
    """

    def __init__(self, launched: bool = False) -> None:
        self.signal: signal.Signals | None = None
        self._patience_s = _SENT_TWICE_S if launched else 0.0
        self._since_s = 0.0
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
            signal.signal(number, self._receive)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        del frame
        now_s = time.monotonic()
        if self.signal is None:
            self._since_s = now_s
        elif number == signal.SIGINT and now_s - self._since_s >= self._patience_s:
            raise KeyboardInterrupt
        self.signal = signal.Signals(number)

    @property
    def call(self) -> Call:
        return Call.GO_ON if self.signal is None else Call.SAVE_AND_STOP


def mark_stopped(folder: Path, words: str | None) -> None:
    """Leave word for scripts that a signal stopped the run and there is more to do; None takes it back.

    The exit status is 0 either way: nothing failed. Nor does the run fail if the drive takes no mark.
    """
    mark = folder / "stopped"
    with suppress(OSError):
        if words is None:
            mark.unlink(missing_ok=True)
        else:
            mark.write_text(f"{words}\n")


class NonFinite(RuntimeError):
    """The loss, the gradients or the weights are no longer finite."""


class PeerFailed(RuntimeError):
    """Another rank stopped; its own message says why."""
