"""The clock of a GPU, on a device that is none: what is recorded, in which order, and what is divided."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch

from bench.kernels.clock import DeviceClock


class Device:
    """Stands in for torch.cuda. A call, and a replay of each call captured, takes a millisecond."""

    def __init__(self) -> None:
        self.now_ms = 0.0
        self.log: list[str] = []
        self.capturing: list[Callable[[], None]] | None = None
        self.refuses_capture = False
        self.stream_now = "default"

    def work(self) -> None:
        """What a call of a way does here."""
        if self.capturing is not None:
            if self.refuses_capture:
                raise RuntimeError("operation not permitted when stream is capturing")
            self.capturing.append(self.work)
            return
        self.log.append(f"work on {self.stream_now}")
        self.now_ms += 1

    @contextmanager
    def stream(self, name: str) -> Iterator[None]:
        before, self.stream_now = self.stream_now, name
        try:
            yield
        finally:
            self.stream_now = before


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Device:
    device = Device()

    class Stream(str):
        def wait_stream(self, other: object) -> None: ...

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            device.log.append("event")
            self.at_ms = device.now_ms

        def synchronize(self) -> None: ...

        def elapsed_time(self, end: "Event") -> float:
            return end.at_ms - self.at_ms

    class CUDAGraph:
        def capture_begin(self) -> None:
            device.capturing = []

        def capture_end(self) -> None:
            self.calls, device.capturing = device.capturing or [], None

        def replay(self) -> None:
            device.log.append("replay")
            for call in self.calls:
                call()

    def sleep(cycles: int) -> None:
        device.log.append("sleep")

    fakes = {
        "current_device": lambda: 0,
        "get_device_properties": lambda _: SimpleNamespace(L2_cache_size=60 << 20),
        "Stream": lambda: Stream("side"),
        "current_stream": lambda: Stream(device.stream_now),
        "stream": device.stream,
        "synchronize": lambda: None,
        "Event": Event,
        "CUDAGraph": CUDAGraph,
        "_sleep": sleep,
        "reset_peak_memory_stats": lambda: None,
        "memory_allocated": lambda: 100,
        "max_memory_allocated": lambda: 175,
    }
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    return device


def test_a_graph_of_all_the_inputs_is_replayed_between_two_events(device: Device) -> None:
    watch = DeviceClock().watch([device.work] * 4)
    assert watch.how == "graph"
    device.log.clear()
    assert watch.run() == pytest.approx(1e-3), "four calls took four milliseconds"
    assert device.log == ["sleep", "event", "replay", *["work on side"] * 4, "event"]
    assert device.stream_now == "default"


def test_what_cannot_be_captured_is_launched(device: Device) -> None:
    device.refuses_capture = True
    watch = DeviceClock().watch([device.work] * 3)
    assert watch.how == "launches"
    assert device.stream_now == "default"
    device.log.clear()
    assert watch.run() == pytest.approx(1e-3)
    assert device.log == ["sleep", "event", *["work on side"] * 3, "event"]


def test_inputs_are_more_than_the_cache_holds(device: Device) -> None:
    clock = DeviceClock()
    assert clock.rotated_bytes == 512 << 20
    assert clock.device == torch.device("cuda", 0)
    assert clock.peak_bytes(lambda: None) == 75
