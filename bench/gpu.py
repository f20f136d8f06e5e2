"""Everything on a GPU in one command and under ten minutes, what matters most first.

    python -m bench.gpu --budget-s 540

Each part is a process of its own with a share of the time, and writes as it goes: whatever ends one, or all,
what was finished is on disk. Time that a part leaves over goes to those after it.
"""

import argparse
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
_GRACE_S = 10.0  # for a part to write what it has


@dataclass(frozen=True)
class Task:
    """A part: its command, in which {limit} stands for the seconds it has, and its share of all."""

    name: str
    share: float
    command: tuple[str, ...]


def tasks(sizes: Sequence[str]) -> list[Task]:
    main_rows = ("--rows", "main")
    first, *larger = sizes
    return [
        Task("checks", 0.10, ("bench.kernels.gpu", "--quick", "--budget-s", "{limit}")),
        Task(f"throughput, {first}", 0.28, ("bench.throughput", "--sizes", first, "--limit-s", "{limit}")),
        *(
            Task(
                f"throughput, {size}",
                0.14,
                ("bench.throughput", "--sizes", size, *main_rows, "--limit-s", "{limit}"),
            )
            for size in larger
        ),
        *(Task(f"breakdown, {size}", 0.05, ("bench.breakdown", "--size", size)) for size in sizes[:2]),
        Task("kernels", 0.12, ("bench.kernels.gpu", "--budget-s", "{limit}")),
        Task("accuracy", 0.12, ("bench.accuracy", "--limit-s", "{limit}")),
    ]


def limits(shares: Sequence[float], done: int, left_s: float) -> float:
    """The seconds of the part after so many, of what is left."""
    rest = sum(shares[done:])
    return left_s * shares[done] / rest if rest else 0.0


def run(task: Task, limit_s: float) -> int:
    """The exit code; a part that takes longer than its limit is interrupted, then ended."""
    inner_s = max(1.0, limit_s - _GRACE_S)
    command = [sys.executable, "-m", *(word.replace("{limit}", f"{inner_s:.0f}") for word in task.command)]
    paths = [str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}
    process = subprocess.Popen(command, cwd=ROOT, env=environment, start_new_session=True)
    try:
        for wait_s in (limit_s, _GRACE_S):
            try:
                return process.wait(wait_s)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGINT)
        return 1
    finally:  # with what it has started; nothing is left where it ended by itself
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=__doc__.splitlines()[0])
    parser.add_argument("--budget-s", type=float, default=570.0, help="seconds for everything, about")
    parser.add_argument("--sizes", default="base,large,huge", help="of throughput, the first with all rows")
    parser.add_argument("--only", help="parts whose names begin so, by commas: checks, throughput, …")
    asked = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print(
            "error: torch sees no CUDA device. `make bench-throughput` measures on the CPU.", file=sys.stderr
        )
        return 2
    start_s, failed = time.monotonic(), []
    every = tasks(asked.sizes.split(","))
    chosen = [t for t in every if not asked.only or t.name.startswith(tuple(asked.only.split(",")))]
    shares = [task.share for task in chosen]
    for done, task in enumerate(chosen):
        limit_s = limits(shares, done, asked.budget_s - (time.monotonic() - start_s))
        print(f"\n=== {task.name}: {limit_s:.0f} s ===\n", flush=True)
        if limit_s < 2 or run(task, limit_s):
            failed.append(task.name)
    took_s = time.monotonic() - start_s
    print(f"\n{took_s:.0f} s. Not finished: {', '.join(failed) or 'nothing'}. Then: make performance")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
