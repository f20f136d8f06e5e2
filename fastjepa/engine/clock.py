"""Where the time of a run goes."""

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

Pause = Literal["judging", "saving"]


@dataclass(frozen=True)
class Lap:
    """An interval of training."""

    train_s: float  # without what comes between the steps
    wait_s: float  # of it, waiting for images
    judge_s: float
    save_s: float  # while no step could run; a checkpoint is written in the background


class StepClock:
    """Measures training time, waiting included, everything `paused` left out."""

    def __init__(self) -> None:
        self._start = time.perf_counter()
        self._wait_s = 0.0
        self._paused_s: dict[Pause, float] = {"judging": 0.0, "saving": 0.0}

    @contextmanager
    def waiting(self) -> Iterator[None]:
        before = time.perf_counter()
        yield
        self._wait_s += time.perf_counter() - before

    @contextmanager
    def paused(self, what: Pause) -> Iterator[None]:
        before = time.perf_counter()
        yield
        self._paused_s[what] += time.perf_counter() - before

    def lap(self) -> Lap:
        """What has passed since the last lap, or since the clock was made."""
        now = time.perf_counter()
        paused_s = self._paused_s
        train_s = now - self._start - sum(paused_s.values())
        lap = Lap(train_s, self._wait_s, paused_s["judging"], paused_s["saving"])
        self._start, self._wait_s, self._paused_s = now, 0.0, {"judging": 0.0, "saving": 0.0}
        return lap


def add_times(before: Mapping[str, float], lap: Lap, *, starting: bool) -> dict[str, float]:
    """What a run has spent in no row of metrics.jsonl, over all its processes, with one lap more.

    Args:
        before: `start_up`, `judging` and `saving` in seconds; what is missing is 0.
        lap: of the time before the first step of a process, or after its last one.
        starting: whether it is the former: what was neither judging nor saving was starting up.
    """
    more = {"start_up": lap.train_s if starting else 0.0, "judging": lap.judge_s, "saving": lap.save_s}
    return {name: before.get(name, 0.0) + seconds for name, seconds in more.items()}
