"""A thousand saves: the process does not grow."""

import os
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.faults.evidence import Watched
from tests.faults.processes import needs_proc
from tests.faults.table import Row

STEPS = 1000
# A checkpoint of these weights is 0.3 MB: a leak of one in three would show.
MOST_GROWTH_KIB = 64 * 1024


def resident_kib(pid: int) -> int:
    found = re.search(r"VmRSS:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    assert found is not None
    return int(found[1])


@needs_proc
@pytest.mark.slow_fault
def test_a_thousand_saves(watched: Watched, table: Callable[[str, str], Row]) -> None:
    row = table("a thousand saves", "no growth in memory or open files")
    steps = (STEPS // 5, STEPS)
    settings = (f"optim.steps={STEPS + 50}", "run.save_every=1", "run.log_every=50")
    process = watched.start(*settings, gates=steps)
    measured: dict[int, tuple[int, int]] = {}
    for step in steps:
        with watched.standing_at(process, step):
            # Where nothing is on its way, neither a batch nor a checkpoint.
            fewest = min(len(os.listdir(f"/proc/{process.pid}/fd")) for _ in range(20))
            measured[step] = resident_kib(process.pid), fewest
    watched.finish(process).check()
    row.times = watched.step
    (memory, files), (memory_after, files_after) = measured.values()
    assert memory_after - memory < MOST_GROWTH_KIB
    assert files_after <= files + 2  # those of a save under way
    assert len(list(watched.checkpoints.iterdir())) <= 3
