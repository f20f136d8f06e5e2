"""What the device is capable of, and what a step asks of it."""

import os
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

Call = Callable[[], Any]
# What a profile shows on a device besides kernels and copies: names of stretches of time, and waits.
_NOT_WORK = (
    "Optimizer.",
    "ProfilerStep",
    "Torch-Compiled",
    "Context Sync",
    "Stream Sync",
    "Event Sync",
    "Stream Wait",
)
os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # its notes would stand between the lines of a table


def wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds_of(call: Call, device: torch.device) -> float:
    """By the wall clock, from an idle device to an idle device."""
    wait_for(device)
    start = time.perf_counter()
    call()
    wait_for(device)
    return time.perf_counter() - start


def host_seconds_of(call: Call, device: torch.device) -> float:
    """What the host takes to hand a call to an idle device, and to wait where the call itself waits."""
    wait_for(device)
    start = time.perf_counter()
    call()
    spent = time.perf_counter() - start
    wait_for(device)
    return spent


@dataclass
class Gauge:
    """A large matrix product and a large copy, timed again in each round.

    Attributes:
        side: of the square matrices: bf16 on a GPU, fp32 on a CPU.
        copied_bytes: of the copy: so many are read and so many written.
        gemm_s, copy_s: seconds of one, a value for each round.
    """

    device: torch.device
    side: int
    copied_bytes: int
    gemm_s: list[float] = field(default_factory=list)
    copy_s: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        dtype = torch.bfloat16 if self.device.type == "cuda" else torch.float32
        self._repeat = 10 if self.device.type == "cuda" else 1
        self._a, self._b = (
            torch.randn(self.side, self.side, device=self.device, dtype=dtype) for _ in range(2)
        )
        self._product = torch.empty_like(self._a)
        self._from = torch.ones(self.copied_bytes, dtype=torch.uint8, device=self.device)
        self._to = torch.empty_like(self._from)
        self._gemm()
        self._copy()  # the first time of each takes longer

    def _gemm(self) -> None:
        for _ in range(self._repeat):
            torch.mm(self._a, self._b, out=self._product)

    def _copy(self) -> None:
        for _ in range(self._repeat):
            self._to.copy_(self._from)

    def read(self) -> None:
        """Time both once more."""
        self.gemm_s.append(seconds_of(self._gemm, self.device) / self._repeat)
        self.copy_s.append(seconds_of(self._copy, self.device) / self._repeat)

    @property
    def flop_per_s(self) -> float:
        return 2 * self.side**3 / median(self.gemm_s)

    @property
    def bytes_per_s(self) -> float:
        """Read and written together."""
        return 2 * self.copied_bytes / median(self.copy_s)


def gauge_for(device: torch.device, quick: bool = False) -> Gauge:
    if quick:
        return Gauge(device, side=128, copied_bytes=1 << 20)
    if device.type == "cuda":
        return Gauge(device, side=8192, copied_bytes=512 << 20)
    return Gauge(device, side=1536, copied_bytes=128 << 20)


@dataclass(frozen=True)
class Kernel:
    """What a profile says of the calls of one name: their number, and the seconds of all together."""

    name: str
    calls: int
    seconds: float


@dataclass(frozen=True)
class Trace:
    """A profile of some calls.

    Attributes:
        kernels: what ran on the device, by name; on a CPU, ops of torch and the time in each alone.
        launches: what the host handed to a GPU: kernels and whole graphs. None on a CPU.
        busy_s: when at least one kernel ran. None on a CPU.
    """

    kernels: list[Kernel]
    launches: int | None
    busy_s: float | None

    @property
    def calls(self) -> int:
        return sum(kernel.calls for kernel in self.kernels)


def trace(call: Call, device: torch.device) -> Trace:
    """Run `call` under the profiler."""
    if device.type == "cuda":
        return _trace_device(call, device)
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        call()
    averages = profiler.key_averages()
    ops = [a for a in averages if a.key.startswith(("aten::", "fastjepa::"))]
    return Trace([Kernel(a.key, a.count, a.self_cpu_time_total / 1e6) for a in ops], None, None)


def _trace_device(call: Call, device: torch.device) -> Trace:
    wait_for(device)
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        call()
        wait_for(device)
    spans, launches, found = [], 0, dict[str, list[int]]()
    for event in profiler.profiler.kineto_results.events():
        name = event.name()
        if event.device_type() != torch.autograd.DeviceType.CUDA:
            launches += "LaunchKernel" in name or "GraphLaunch" in name
        elif not event.is_user_annotation() and not name.startswith(_NOT_WORK):
            spans.append((event.start_ns(), event.start_ns() + event.duration_ns()))
            if not name.startswith(("Memcpy", "Memset")):
                found.setdefault(name, []).append(event.duration_ns())
    kernels = [Kernel(name, len(times), sum(times) / 1e9) for name, times in found.items()]
    return Trace(kernels, launches, covered(spans) / 1e9)


def covered(spans: Iterable[tuple[int, int]]) -> int:
    """The length of the union of intervals (start, end)."""
    total, reached = 0, None
    for start, end in sorted(spans):
        if reached is None or start > reached:
            total, reached = total + end - start, end
        elif end > reached:
            total, reached = total + end - reached, end
    return total
