"""Where the time of a training interval goes."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass


@dataclass(frozen=True)
class Lap:
    """An interval of training."""

    train_s: float  # without evaluation and saving
    wait_s: float  # of it, waiting for images


class StepClock:
    """Measures training time, waiting included, everything `paused` left out."""

    def __init__(self) -> None:
        self._start = time.perf_counter()
        self._wait_s = 0.0
        self._paused_s = 0.0

    @contextmanager
    def waiting(self) -> Iterator[None]:
        before = time.perf_counter()
        yield
        self._wait_s += time.perf_counter() - before

    @contextmanager
    def paused(self) -> Iterator[None]:
        before = time.perf_counter()
        yield
        self._paused_s += time.perf_counter() - before

    def lap(self) -> Lap:
        """What has passed since the last lap."""
        now = time.perf_counter()
        lap = Lap(now - self._start - self._paused_s, self._wait_s)
        self._start, self._wait_s, self._paused_s = now, 0.0, 0.0
        return lap
