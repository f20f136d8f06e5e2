"""All rows in one process, in turn: in each round every row once, in another order each time.

Rows stay on the device while memory allows. One that does not is built twice, at the start and at the end of
the rounds, and timed for half of them each time. Whatever goes wrong with a row is what the row then says.
"""

import gc
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from types import FrameType

import torch

from bench.kernels.check import first_line
from bench.kernels.memory import peak_bytes
from bench.throughput.entries import Entry, Step
from bench.throughput.gauges import Gauge, host_seconds_of, seconds_of, trace, wait_for
from bench.throughput.setting import Inputs
from fastjepa.engine.graphs import WARM_UP

_MOST_MEMORY = 0.9  # of the device, that may be planned with


@dataclass
class Contestant:
    """A row as it is measured.

    Attributes:
        step: None while it is not in memory.
        red: why it has no time.
        laps: seconds of a step, a value for each round, in the order of the rounds.
        ran: the numbers of the steps of each lap.
        host: seconds of the host in a step handed to an idle device.
        held_bytes: of weights, states and graphs between steps; None on a CPU.
        peak_bytes: the same and what a step adds; on a CPU what a step adds alone.
        busy_s: seconds of a step in which the device runs a kernel; None on a CPU.
        kernels: run by the device in a step; on a CPU, ops of torch.
        launches: by the host in a step.
    """

    entry: Entry
    step: Step | None = None
    stays: bool = True
    red: str = ""
    laps: list[float] = field(default_factory=list)
    ran: list[range] = field(default_factory=list)
    host: list[float] = field(default_factory=list)
    expected_s: float = 0.0
    built_s: float = 0.0
    held_bytes: int | None = None
    peak_bytes: int | None = None
    busy_s: float | None = None
    kernels: int | None = None
    launches: int | None = None


@dataclass
class Race:
    """Attributes:
    rounds: of each row.
    steps: most of them in a row's turn.
    deadline_s: of time.monotonic(), for everything.
    row_limit_s: for building a row and warming it up.
    """

    inputs: Inputs
    gauge: Gauge
    rounds: int
    steps: int
    deadline_s: float
    row_limit_s: float
    contestants: list[Contestant] = field(default_factory=list)

    @property
    def device(self) -> torch.device:
        return self.inputs.setting.device

    @property
    def running(self) -> list[Contestant]:
        return [each for each in self.contestants if not each.red]

    def add(self, entry: Entry) -> Contestant:
        """Build a row, warm it up over all the masks and look at a step of it; or note why not."""
        one = Contestant(entry)
        self.contestants.append(one)
        left_s = self.deadline_s - time.monotonic() - self._race_s(steps=1)
        if entry.gpu_alone and self.device.type == "cpu":
            one.red = "needs a GPU"
        elif left_s < 1:
            one.red = "no time was left"
        else:
            one.stays = self._has_room()
            self._guarded(one, min(left_s, self.row_limit_s), partial(self._build, one, look=True))
            if "out of memory" in one.red.lower() and self._evict_all():
                one.red = ""
                self._guarded(one, self.row_limit_s, partial(self._build, one, look=True))
                one.stays = False
            if not self._has_room():
                one.stays = False
            if not one.stays:
                self._free(one)
        return one

    def run(self, after_round: Callable[[], None] = lambda: None) -> None:
        """Time every row that was built, as long as there is time.

        Earlier times are forgotten, unless time is up before there are as many again.
        """
        before = [(one, one.laps, one.ran, one.host) for one in self.running]
        for one in self.running:
            one.laps, one.ran, one.host = [], [], []
        steps = self._affordable_steps()
        first, second = range(self.rounds // 2), range(self.rounds // 2, self.rounds)
        self._visit(first, steps)
        for turn in range(self.rounds):
            self.gauge.read()
            order = [one for one in self.running if one.stays]
            random.Random(turn).shuffle(order)
            for one in order:
                if time.monotonic() < self.deadline_s:
                    self._guarded(one, self.row_limit_s, partial(self._lap, one, turn, steps))
            if turn:  # before, nothing has a spread
                after_round()
        self._visit(second, steps)
        if any(len(one.laps) < len(laps) for one, laps, *_ in before if not one.red):
            for one, laps, ran, host in before:
                if laps:
                    one.laps, one.ran, one.host = laps, ran, host

    def free_all(self) -> None:
        for one in self.contestants:
            self._free(one)

    def _visit(self, turns: range, steps: int) -> None:
        """Time those that do not stay in memory."""
        for one in [each for each in self.running if not each.stays]:
            if time.monotonic() > self.deadline_s:
                continue
            self._guarded(one, self.row_limit_s, partial(self._build, one, look=False))
            for turn in turns:
                if not one.red and time.monotonic() < self.deadline_s:
                    self._guarded(one, self.row_limit_s, partial(self._lap, one, turn, steps))
            self._free(one)

    def _lap(self, one: Contestant, turn: int, steps: int) -> None:
        """The same steps for all rows in the same round."""
        step = one.step
        assert step is not None
        numbers = range(turn * steps, (turn + 1) * steps)
        if self.device.type == "cuda":
            one.host.append(host_seconds_of(lambda: step(numbers[0]), self.device))
        one.laps.append(seconds_of(lambda: [step(n) for n in numbers], self.device) / steps)
        one.ran.append(numbers)
        if self.device.type == "cpu":  # which is the host
            one.host.append(one.laps[-1])

    def _build(self, one: Contestant, look: bool) -> None:
        on_gpu = self.device.type == "cuda"
        reserved = self._reserved()
        allocated = torch.cuda.memory_allocated() if on_gpu else 0
        start_s = time.monotonic()
        if on_gpu:
            torch.cuda.reset_peak_memory_stats()
        one.step = step = one.entry.build(self.inputs)
        # Every shape that is to come, so that nothing is compiled or chosen when time is taken.
        captures = one.entry.is_graph and on_gpu  # for each shape, after its first steps
        many = captures or (look and (one.entry.compiles or on_gpu))
        numbers = [*range(self.inputs.setting.draws if many else 2)] * (WARM_UP + 2 if captures else 1)
        took_s = [seconds_of(partial(step, number), self.device) for number in numbers]
        one.built_s = time.monotonic() - start_s
        if not look:
            return
        one.expected_s = min(took_s)  # others may have had the machine in the meantime
        if on_gpu:
            one.held_bytes = self._reserved() - reserved
            if not one.entry.is_graph:  # a graph's own memory is taken when it is captured
                torch.cuda.reset_peak_memory_stats()
                step(1)
                wait_for(self.device)
            one.peak_bytes = torch.cuda.max_memory_allocated() - allocated
        else:
            one.peak_bytes = peak_bytes(lambda: step(1))
        seen = trace(lambda: step(2), self.device)
        if seen.calls:  # a profiler may be forbidden to look
            one.kernels, one.launches, one.busy_s = seen.calls, seen.launches, seen.busy_s

    def _has_room(self) -> bool:
        """For what is there, and one more row as large as the largest."""
        if self.device.type == "cpu":
            return True
        largest = max((max(one.peak_bytes or 0, one.held_bytes or 0) for one in self.contestants), default=0)
        total = torch.cuda.get_device_properties(self.device).total_memory
        return self._reserved() + largest < _MOST_MEMORY * total

    def _reserved(self) -> int:
        """Bytes that nothing else can have: of tensors, and of graphs, whose memory no tensor shows."""
        gc.collect()
        if self.device.type == "cpu":
            return 0
        with suppress(RuntimeError):  # after a capture that failed
            torch.cuda.empty_cache()
        return torch.cuda.memory_reserved()

    def _evict_all(self) -> bool:
        """Whether there was any row in memory."""
        held = [one for one in self.contestants if one.step is not None]
        for one in held:
            self._free(one)
            one.stays = False
        return bool(held)

    def _free(self, one: Contestant) -> None:
        one.step = None
        self._reserved()

    def _guarded(self, one: Contestant, limit_s: float, do: Callable[[], None]) -> None:
        try:
            with at_most(limit_s):
                do()
        except Exception as failure:
            one.red = first_line(failure)
        if one.red:  # and the traceback is gone, whose frames held tensors
            self._free(one)

    def _race_s(self, steps: int) -> float:
        """What the rounds of all rows take, with those built anew."""
        laps = self.rounds * (steps + 1) * sum(one.expected_s for one in self.running)
        return laps + 2 * sum(one.built_s for one in self.running if not one.stays)

    def _affordable_steps(self) -> int:
        left_s = self.deadline_s - time.monotonic()
        fitting = (n for n in range(self.steps, 1, -1) if self._race_s(n) < left_s)
        return next(fitting, 1)


@contextmanager
def at_most(seconds: float) -> Iterator[None]:
    """Raise TimeoutError in the block once it has taken so long, where there are signals for it."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(_signal: int, _frame: FrameType | None) -> None:
        raise TimeoutError(f"it took more than {seconds:.0f} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 0.1))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
