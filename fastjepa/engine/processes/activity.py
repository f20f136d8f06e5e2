"""What a rank is doing, so that the others can say what it was doing when they lost it."""

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from types import FrameType


class Doing(StrEnum):
    """In words that follow "it was"."""

    STARTING = "starting"
    LOADING = "waiting for data"
    COMPUTING = "computing"
    AGREEING = "waiting for the other ranks"
    SAVING = "saving"
    ON_MAIN = "judging, or at another thing that rank 0 does for all"


# These take as long as they take: a drive is slow, a probe is thorough.
LONG = frozenset({Doing.SAVING, Doing.ON_MAIN})

# Where a collective waits for the other ranks.
_COLLECTIVES = ("torch/distributed/", "deepspeed/comm/")


@dataclass(frozen=True)
class Moment:
    """What a rank is doing at one time.

    Attributes:
        step: optimizer steps done.
        moves: how often it has gone from one thing to the next. All ranks do the same things in the same
            order, so the one with fewer moves is behind.
    """

    step: int = 0
    doing: Doing = Doing.STARTING
    moves: int = 0


@dataclass
class Activity:
    """Kept by the thread that trains, read by the one that watches."""

    now: Moment = field(default_factory=Moment)
    saved_step: int = 0  # of the newest checkpoint
    _thread: int = field(default_factory=threading.get_ident)

    def begin(self, doing: Doing, step: int, saved_step: int) -> None:
        """Go on to the next thing."""
        self.now = Moment(step, doing, self.now.moves + 1)
        self.saved_step = saved_step

    @contextmanager
    def during(self, doing: Doing) -> Iterator[None]:
        """Within it this rank is doing that, and then again what it did before."""
        before = self.now.doing
        self.now = Moment(self.now.step, doing, self.now.moves + 1)
        try:
            yield
        finally:
            self.now = Moment(self.now.step, before, self.now.moves + 1)

    def where_to_go_on(self) -> str:
        """A sentence on the newest checkpoint."""
        if not self.saved_step:
            return "There is no checkpoint yet."
        return f"The same command goes on from the checkpoint of step {self.saved_step}."

    def place(self) -> tuple[str, bool]:
        """The line at which the training thread is, and whether it waits in a collective there."""
        frame = sys._current_frames().get(self._thread)
        return ("", False) if frame is None else place_of(frame)


def place_of(frame: FrameType) -> tuple[str, bool]:
    """A frame's line, and whether it or one of those that called it is in a collective."""
    line = f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno} in {frame.f_code.co_name}"
    caller: FrameType | None = frame
    while caller is not None:
        if any(part in caller.f_code.co_filename for part in _COLLECTIVES):
            return line, True
        caller = caller.f_back
    return line, False
