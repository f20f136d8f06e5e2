"""A rank that is killed, or stands still: the others end, naming it, and nothing of the run is left."""

import os
import signal
from collections.abc import Callable

import pytest

from tests.faults.evidence import RUN, TWO, Watched, lines_with, torchrun
from tests.faults.processes import assert_gone, descendants, needs_proc, ranks_below
from tests.faults.table import Row

pytestmark = [needs_proc, pytest.mark.slow_fault]


@pytest.mark.parametrize(
    ("number", "fault", "named"),
    [
        (signal.SIGKILL, "a rank is killed", "has ended without a word"),
        (signal.SIGSTOP, "a rank is stopped", "has not been heard from for"),
    ],
    ids=["killed", "stopped"],
)
def test_a_lost_rank(
    watched: Watched,
    uninterrupted: Callable[..., Watched],
    table: Callable[[str, str], Row],
    number: signal.Signals,
    fault: str,
    named: str,
) -> None:
    row = table(fault, "the others end at once or after run.dead_after_s, naming it; no orphans")
    for rank in (1, 0):
        step = 25 if rank else 70
        settings = ("speed.workers=1", "run.dead_after_s=10")
        process = watched.start(*RUN, *settings, launcher=torchrun(2), gates=[step])
        with watched.standing_at(process, step):
            below = descendants(process.pid)
            lost = ranks_below(process.pid)[rank]
            os.kill(lost, number)
        row.times += 1
        ended = watched.finish(process)
        assert ended.code != 0
        assert lines_with(ended.err, f"error: rank {rank} (", f"process {lost})", named), ended.err
        assert_gone(below)
    resumed = watched(*RUN, launcher=TWO).check()
    assert lines_with(resumed.out, "Resuming at step")
    row.hold_against(watched, uninterrupted(*RUN, launcher=TWO))
