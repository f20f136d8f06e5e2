"""How a run ends before its last step: signals only set a flag, and all ranks agree at every step."""

import signal
from enum import IntEnum
from types import FrameType


class Call(IntEnum):
    """What a rank wants at a step boundary; the largest of all ranks counts."""

    GO_ON = 0
    SAVE_AND_STOP = 1
    GIVE_UP = 2


class StopRequest:
    """Remembers the first SIGTERM, SIGUSR1 or SIGINT (Ctrl-C). A second Ctrl-C interrupts at once."""

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
            signal.signal(number, self._receive)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        del frame
        if number == signal.SIGINT and self.signal is not None:
            raise KeyboardInterrupt
        self.signal = signal.Signals(number)

    @property
    def call(self) -> Call:
        return Call.GO_ON if self.signal is None else Call.SAVE_AND_STOP


class NonFinite(RuntimeError):
    """The loss, the gradients or the weights are no longer finite."""


class PeerFailed(RuntimeError):
    """Another rank stopped; its own message says why."""
