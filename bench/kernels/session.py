"""What the benchmarks of one run share: the clock, the rows so far, and what to write at the end."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench.kernels import choices, machine, results
from bench.kernels.case import DEFAULT, Case, Phase, Random
from bench.kernels.check import Verdicts, check
from bench.kernels.choices import Measurements
from bench.kernels.clock import Clock
from bench.kernels.entry import Entry, decides, enter
from bench.kernels.race import LEAST_ROUNDS, Race
from bench.kernels.table import Row

MOST_ROUNDS = 100


@dataclass
class Session:
    """One run of benchmarks.

    Attributes:
        clock: of the device.
        seconds_each: that the rounds of one case and phase may take.
        copied_bytes: of the copy of memory that runs along.
        is_right: false as soon as an implementation of ours was red.
        distrusted: by op, implementations that were red in some dtype or shape, and why: they are neither
            timed nor chosen in any other.
    """

    clock: Clock
    seconds_each: float
    copied_bytes: int
    rows: list[Row] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    measurements: Measurements = field(default_factory=Measurements)
    is_right: bool = True
    distrusted: dict[str, dict[str, str]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.random = Random.on(self.clock.device)
        self._verdicts: dict[str, Verdicts] = {}

    def judge(self, case: Case, in_time: Callable[[], bool] = lambda: True) -> Verdicts:
        """Checked once, for all its phases."""
        if str(case) not in self._verdicts:
            verdicts = check(case, self.random, in_time)
            self._verdicts[str(case)] = verdicts
            self.left_out += [f"{case}: {name}: {why}" for name, why in verdicts.cannot.items()]
            self.is_right = self.is_right and verdicts.ours_are_right
        return self._verdicts[str(case)]

    def enter(self, case: Case, phase: Phase) -> Entry:
        verdicts = self.judge(case).without(self.distrusted.get(case.op, {}))
        entry = enter(case, phase, verdicts, self.clock, self.random, self.copied_bytes)
        self.left_out += [f"{case} {phase}: {line}" for line in entry.left_out]
        return entry

    def rounds(self, race: Race) -> int:
        """How many fit in the time, after one of them, which is not counted."""
        start = time.monotonic()
        race.round()
        for seconds in race.seconds.values():
            seconds.clear()
        return max(LEAST_ROUNDS, min(MOST_ROUNDS, int(self.seconds_each / (time.monotonic() - start))))

    def keep(self, entry: Entry) -> list[Row]:
        rows = entry.rows()
        self.rows += rows
        if decides(entry.case, entry.phase):
            self.measurements.add(entry.choices, rows, needs_graph=self.clock.device.type == "cuda")
        return rows

    def write(self, folder: Path | None, tables: Path | None, **more: Any) -> list[str]:
        """Write the results and the device's table, to the folders given; what was written, for people."""
        facts = machine.facts(self.clock.device) | more
        said = []
        if folder is not None:
            said.append(f"Results: {results.save(folder, facts, self.rows, self.left_out)}")
        if tables is not None:
            said.append(self._write_table(tables, facts))
        return said

    def _write_table(self, tables: Path, facts: dict[str, Any]) -> str:
        path = choices.write(tables, facts["device"], self.measurements.fastest(), facts)
        if path is None:
            return "No table of choices was written: there was nothing to choose between."
        return f"Table of choices: {path}"


def compare(session: Session, benchmark: Any, case: Case, phase: Phase) -> None:
    """One benchmark. Of the rounds, pytest-benchmark times the op as a user gets it; the rest goes before."""
    benchmark.group = f"{case.op} {phase}"
    entry = session.enter(case, phase)
    if entry.verdicts.may_be_timed:
        run(session, benchmark, entry.race)
    session.keep(entry)
    assert entry.verdicts.ours_are_right, f"{case}: {entry.verdicts.red}"


def run(session: Session, benchmark: Any, race: Race) -> None:
    benchmark.pedantic(
        lambda: race.time(DEFAULT),
        setup=lambda: race.round(without=DEFAULT),
        rounds=session.rounds(race),
    )
