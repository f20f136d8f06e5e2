"""Several ways to do the same against each other: in one process, in turn, medians of many rounds."""

import random
import time
from statistics import median

import torch

from bench.kernels.clock import Clock, Watch
from bench.kernels.table import Row

COPY = "copy"
LEAST_ROUNDS = 9


class Race:
    """Every round runs each way once, so that whatever else the machine does hits all alike.

    A plain copy of memory runs along: what a way is worth is its share of that speed.

    Args:
        clock: of the device.
        copied_bytes: how large the copy is.
    """

    def __init__(self, clock: Clock, copied_bytes: int) -> None:
        self.clock, self.copied_bytes = clock, copied_bytes
        self.watches: dict[str, Watch] = {}
        self.kinds: dict[str, str] = {}
        self.seconds: dict[str, list[float]] = {}
        with clock.stream():
            source = torch.randint(256, (copied_bytes,), dtype=torch.uint8, device=clock.device)
            to = torch.empty_like(source)
            self.add(COPY, COPY, clock.watch([lambda: to.copy_(source)]))

    def add(self, name: str, kind: str, watch: Watch) -> None:
        self.watches[name], self.kinds[name], self.seconds[name] = watch, kind, []

    def time(self, name: str) -> None:
        self.seconds[name].append(self.watches[name].run())

    def round(self, without: str = "") -> None:
        """One of each, in another order every time: what runs before one has its data in the cache."""
        for name in random.sample(list(self.watches), len(self.watches)):
            if name != without:
                self.time(name)

    def run(self, budget_s: float, most_rounds: int = 100) -> None:
        """As many rounds as the time allows, and a few whatever it takes."""
        until_s = time.monotonic() + budget_s
        for done in range(most_rounds):
            if done >= LEAST_ROUNDS and time.monotonic() > until_s:
                break
            self.round()

    def rows(
        self, op: str, case: str, phase: str, dtype: str, bytes_moved: int, peak_bytes: dict[str, int]
    ) -> list[Row]:
        """`bytes_moved` is 0 for what is not bound by memory; `peak_bytes` are those of some ways."""
        medians = {name: median(seconds) for name, seconds in self.seconds.items()}
        copy_speed = 2 * self.copied_bytes / medians[COPY]

        def fastest(kind: str) -> float | None:
            return min((medians[name] for name in medians if self.kinds[name] == kind), default=None)

        published, stock = fastest("published"), fastest("stock")

        def row(name: str, seconds: float) -> Row:
            moved = 2 * self.copied_bytes if name == COPY else bytes_moved
            return Row(
                op=op,
                case=case,
                phase=phase,
                dtype=dtype,
                way=name,
                kind=self.kinds[name],
                how=self.watches[name].how,
                rounds=len(self.seconds[name]),
                seconds=seconds,
                bytes_moved=moved,
                peak_bytes=peak_bytes.get(name),
                gb_per_s=moved / seconds / 1e9,
                of_copy=moved / seconds / copy_speed,
                over_published=None if published is None or name == COPY else published / seconds,
                over_stock=None if stock is None or name == COPY else stock / seconds,
            )

        return [row(name, medians[name]) for name in [*[n for n in medians if n != COPY], COPY]]
