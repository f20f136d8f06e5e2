"""How a run ends before its last step: signals only set a flag, and all ranks agree at every step."""

import signal
import time
from contextlib import suppress
from enum import IntEnum
from pathlib import Path
from types import FrameType

from fastjepa.signals import STOPPING, let_through

# Ctrl-C reaches every process of a terminal, and then launchers send it to theirs once more.
_SENT_TWICE_S = 5.0


class Call(IntEnum):
    """What a rank wants at a step boundary; the largest of all ranks counts."""

    GO_ON = 0
    SAVE_AND_STOP = 1
    GIVE_UP = 2


class StoppedEarly(BaseException):
    """A signal came before there was anything to save."""


class StopRequest:
    """Hears SIGTERM, SIGUSR1, SIGHUP and SIGINT (Ctrl-C) from now on.

    Until `remember` is called they end what is under way at once, as there are no other ranks yet to agree
    with; one that was held comes as soon as this is made. After that the first is remembered, and a second
    Ctrl-C interrupts at once.
    """

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self._remembers = False
        self._patience_s = 0.0
        self._since_s = 0.0
        for number in (*STOPPING, signal.SIGINT):
            # nohup has SIGHUP ignored, and means it.
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, self._receive)
        let_through()

    def remember(self, launched: bool) -> None:
        """End nothing at once any more.

        Args:
            launched: by something that passes signals on: then a Ctrl-C counts as a second one only some
                seconds after the first.
        """
        self._patience_s = _SENT_TWICE_S if launched else 0.0
        self._remembers = True

    def _receive(self, number: int, frame: FrameType | None) -> None:
        del frame
        if not self._remembers:
            raise KeyboardInterrupt if number == signal.SIGINT else StoppedEarly
        now_s = time.monotonic()
        if self.signal is None:
            self._since_s = now_s
        elif number == signal.SIGINT and now_s - self._since_s >= self._patience_s:
            raise KeyboardInterrupt
        self.signal = signal.Signals(number)

    def is_made(self) -> bool:
        return self.signal is not None

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
            folder.mkdir(parents=True, exist_ok=True)
            mark.write_text(f"{words}\n")


class NonFinite(RuntimeError):
    """The loss, the gradients or the weights are no longer finite."""


class PeerFailed(RuntimeError):
    """Another rank stopped; its own message says why."""
