"""Everything on a GPU, in one process and under eight minutes: what is right, what is fast, what to choose.

    python -m bench.kernels.gpu

First every op is checked in bf16, fp32 and fp16; an implementation that is red in one of them is neither
timed nor chosen, and if it is what a user gets, its op has no numbers. Then the shoot-out of attention, then
the ops that memory bounds. It writes bench/results/<device>/ and the device's table of choices.
`--device cpu --quick` runs the same code where there is no GPU.
"""

import argparse
import gc
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from bench.kernels import (
    bench_adamw,
    bench_attention,
    bench_ema,
    bench_gather,
    bench_loss,
    bench_patchify,
    choices,
    machine,
    results,
)
from bench.kernels.case import DEFAULT, Case, Phase, Scale
from bench.kernels.check import first_line, is_ours
from bench.kernels.clock import Clock, DeviceClock, WallClock
from bench.kernels.session import Session
from bench.kernels.table import Row, markdown, summary

BOUND_BY_MEMORY = (bench_gather, bench_patchify, bench_loss, bench_ema, bench_adamw)
DTYPES = (torch.bfloat16, torch.float32, torch.float16)
# They end by these together, and writing takes a few seconds.
BUDGET_S = 410.0
CHECKS, ATTENTION, MEMORY = 0.32, 0.44, 0.24  # shares of it


@dataclass
class Pace:
    """How the time of a section is shared out among its cases."""

    budget_s: float
    cases: int

    def __post_init__(self) -> None:
        self.start_s = time.monotonic()

    @property
    def is_over(self) -> bool:
        return time.monotonic() - self.start_s > self.budget_s

    def allows(self, done: int) -> bool:
        """Whether the case after so many is still ahead of its share, so that something slow may start."""
        return time.monotonic() - self.start_s < self.budget_s * (done + 1) / self.cases


def check_all(session: Session, cases: Sequence[Case], budget_s: float) -> None:
    """Judge every implementation at odd shapes; what is red is distrusted after.

    What there was no time for is named. It may still be timed: each case is judged before that, at its size.
    """
    pace = Pace(budget_s, len(cases))
    for case in cases:
        distrusted = session.distrusted.setdefault(case.op, {})
        if pace.is_over:
            session.left_out.append(f"check of {case}: no time was left")
            continue
        try:
            verdicts = session.judge(case, in_time=lambda: False)
            red = {name: why for name, why in verdicts.red.items() if is_ours(name)}
        except Exception as failure:  # in the inputs or in torch: nothing about this op is known then
            red = {DEFAULT: first_line(failure)}
            session.is_right = False
        for name, why in red.items():
            distrusted.setdefault(name, f"{case}: {why}")
        lines = "".join(f"\n    {name}: {why}" for name, why in red.items())
        print(f"{'RED' if red else 'ok ':4}{case}{lines}", flush=True)


def race_all(session: Session, cases: Sequence[Case], budget_s: float) -> None:
    """Time the cases in each of their phases, and print each as it is done."""
    pace = Pace(budget_s, len(cases))
    for done, case in enumerate(cases):
        phases = [phase for phase in case.bytes_moved if is_timed(case, phase)]
        for phase in phases:
            if pace.is_over:
                session.left_out.append(f"{case} {phase}: no time was left")
                continue
            try:
                rows = race_one(session, case, phase, partial(pace.allows, done))
            except Exception as failure:  # out of memory, say: what comes after may do better
                session.left_out.append(f"{case} {phase}: {first_line(failure)}")
                continue
            print(markdown(rows), flush=True)
            collect(session.clock)


def race_one(session: Session, case: Case, phase: Phase, in_time: Callable[[], bool]) -> list[Row]:
    red = session.distrusted.get(case.op, {})
    if DEFAULT in red:
        rows = [red_row(case, phase, red[DEFAULT])]
        session.rows += rows
        return rows
    session.judge(case, in_time)
    entry = session.enter(case, phase)
    if entry.verdicts.may_be_timed:
        entry.race.run(session.seconds_each)
    return session.keep(entry)


def is_timed(case: Case, phase: Phase) -> bool:
    """The two passes of attention are judged apart; their sum would take the time of other lengths."""
    return not (case.op == "packed_attention" and phase == "forward+backward")


def red_row(case: Case, phase: Phase, why: str) -> Row:
    dtype = str(case.dtype).removeprefix("torch.")
    return Row(case.op, case.name, phase, dtype, way="fastjepa", kind="red", red=why)


def collect(clock: Clock) -> None:
    """Graphs hold memory until they are gone."""
    gc.collect()
    if clock.device.type == "cuda":
        # Before torch 2.12 a capture that failed leaves the allocator waiting for its end; it objects here.
        with suppress(RuntimeError):
            torch.cuda.empty_cache()


def measure(session: Session, scale: Scale, dtype: torch.dtype, budget_s: float, only: str = "") -> None:
    """Those ops with `only` in their names."""
    modules = (bench_attention, *BOUND_BY_MEMORY)
    print("## Correctness\n", flush=True)
    checks = [case for each in DTYPES for module in modules for case in module.cases("small", each)]
    check_all(session, [case for case in checks if only in case.op], CHECKS * budget_s)
    print("\n## Attention\n", flush=True)
    attention = [case for case in bench_attention.cases(scale, dtype) if only in case.op]
    race_all(session, attention, ATTENTION * budget_s)
    print("## Bound by memory\n", flush=True)
    others = [case for m in BOUND_BY_MEMORY for case in m.cases(scale, dtype) if only in case.op]
    race_all(session, others, MEMORY * budget_s)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.kernels.gpu", description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--quick", action="store_true", help="small shapes and few rounds, to try the code")
    parser.add_argument("--results", type=Path, help="folder of the results, bench/results by default")
    parser.add_argument(
        "--tables", type=Path, help="folder of the tables, that of fastjepa_kernels by default"
    )
    parser.add_argument("--only", default="", help="ops with this in their names")
    parser.add_argument("--budget-s", type=float, default=BUDGET_S, help="seconds that it may take, about")
    asked = parser.parse_args(arguments)
    if not asked.quick:  # which is no measurement, and written only where it is told to
        asked.results = asked.results or results.RESULTS
        asked.tables = asked.tables or choices.TABLES
    if asked.device == "cuda" and not torch.cuda.is_available():
        print("error: torch sees no CUDA device. `make bench` measures on the CPU.", file=sys.stderr)
        return 2

    warnings.filterwarnings("ignore", message=".*determinis")  # said wherever memory is poisoned
    start_s = time.monotonic()
    clock = DeviceClock() if asked.device == "cuda" else WallClock(1 << 20 if asked.quick else 64 << 20)
    session = Session(
        clock,
        seconds_each=0.01 if asked.quick else 0.3,
        copied_bytes=1 << 20 if asked.quick else 512 << 20,
    )
    facts = machine.facts(clock.device)
    print(
        f"# {facts['device']}\n\n" + "\n".join(f"- {name}: {value}" for name, value in facts.items()) + "\n"
    )
    dtype = torch.bfloat16 if asked.device == "cuda" else torch.float32
    try:
        measure(session, "small" if asked.quick else "gpu", dtype, asked.budget_s, asked.only)
    finally:  # whatever ends it, what was measured is kept: a GPU is not always to be had
        print("## Summary\n\n" + summary(session.rows) + "\n")
        print("".join(f"not measured: {line}\n" for line in session.left_out))
        said = session.write(asked.results, asked.tables, seconds=round(time.monotonic() - start_s))
        print("\n".join(said))
    return 0 if session.is_right else 1


if __name__ == "__main__":
    sys.exit(main())
