"""Timing: on the CPU by the wall clock, on a GPU by device events around replays of a graph."""

import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import torch

Call = Callable[[], Any]
_HEAD_START = 200_000  # cycles that the device is kept busy while the host hands over what is timed


@dataclass(frozen=True)
class Watch:
    """Runs a way and gives the seconds of one call. `how` it is timed stands in the table."""

    how: str
    run: Callable[[], float]


class Clock(Protocol):
    device: torch.device
    rotated_bytes: int  # inputs of so many bytes are gone through in turn, more than a cache holds

    def stream(self) -> Any:
        """A context for whatever prepares calls."""

    def watch(self, calls: Sequence[Call]) -> Watch:
        """Of calls that do the same on inputs that lie apart."""

    def peak_bytes(self, call: Call) -> int:
        """The most memory of tensors that is held at a time during a call, above what was before."""


class WallClock:
    """One call in each round, on the next inputs."""

    device = torch.device("cpu")

    def __init__(self, rotated_bytes: int = 64 << 20) -> None:
        self.rotated_bytes = rotated_bytes

    def stream(self) -> Any:
        return nullcontext()

    def watch(self, calls: Sequence[Call]) -> Watch:
        calls[0]()
        turn = itertools.cycle(calls)

        def run() -> float:
            call = next(turn)
            start = time.perf_counter()
            call()
            return time.perf_counter() - start

        return Watch("wall clock", run)

    def peak_bytes(self, call: Call) -> int:
        from bench.kernels.memory import peak_bytes

        return peak_bytes(call)


class DeviceClock:
    """All the inputs in each round: one replay of a graph, or launches one by one where none can be made."""

    def __init__(self) -> None:
        self.device = torch.device("cuda", torch.cuda.current_device())
        self.rotated_bytes = max(512 << 20, 4 * torch.cuda.get_device_properties(self.device).L2_cache_size)
        # A backward pass runs on the stream of its forward pass, and a graph is not captured on the default.
        self._stream = torch.cuda.Stream()

    @contextmanager
    def stream(self) -> Iterator[None]:
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            yield
        torch.cuda.current_stream().wait_stream(self._stream)

    def watch(self, calls: Sequence[Call]) -> Watch:
        def launch() -> None:
            for call in calls:
                call()

        with self.stream():
            for _ in range(2):
                launch()
        torch.cuda.synchronize()
        how, replay = "graph", self._capture(launch)
        if replay is None:
            how, replay = "launches", launch

        def run() -> float:
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            with torch.cuda.stream(self._stream):
                torch.cuda._sleep(_HEAD_START)
                start.record()
                replay()
                end.record()
            end.synchronize()
            return start.elapsed_time(end) / 1e3 / len(calls)

        return Watch(how, run)

    def _capture(self, launch: Callable[[], None]) -> Callable[[], None] | None:
        """None if something in it waits for the device, which torch says in many classes of error."""
        graph = torch.cuda.CUDAGraph()
        try:
            # torch.cuda.graph would collect garbage each time, which takes longer than all the rest.
            with torch.cuda.stream(self._stream):
                graph.capture_begin()
                try:
                    launch()
                finally:
                    graph.capture_end()
            graph.replay()
        except Exception:
            torch.cuda.synchronize()
            return None
        torch.cuda.synchronize()
        return graph.replay

    def peak_bytes(self, call: Call) -> int:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        kept = call()
        peak = torch.cuda.max_memory_allocated() - before
        del kept
        return peak
