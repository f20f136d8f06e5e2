"""Loader workers: one that hangs is named, and signals to a whole job do not end them."""

import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.faults.evidence import RUN, STEPS, Watched, lines_with
from tests.faults.processes import assert_gone, children, descendants, needs_proc
from tests.faults.table import Row
from tests.faults.test_bad_images import RUN as FOLDER_RUN
from tests.faults.test_bad_images import write_images

HARM = Path(__file__).with_name("harm.py")

pytestmark = needs_proc


@pytest.mark.slow_fault
def test_sigterm_to_a_worker(
    watched: Watched, uninterrupted: Callable[..., Watched], table: Callable[[str, str], Row]
) -> None:
    row = table("SIGTERM to a loader worker", "ignored: the trainer decides when to stop")
    process = watched.start(*RUN, "speed.workers=2", gates=[3])
    with watched.standing_at(process, 3):
        workers = children(process.pid)
        assert len(workers) == 2
        for pid in workers:
            os.kill(pid, signal.SIGTERM)
            row.times += 1
    watched.finish(process).check()
    assert watched.step == STEPS
    assert_gone(workers)
    row.hold_against(watched, uninterrupted(*RUN))


def test_a_worker_that_hangs(watched: Watched, table: Callable[[str, str], Row]) -> None:
    """Opening a FIFO without a writer never returns, as reading from a drive that is gone."""
    row = table("a loader worker hangs", "it and its image are named after the timeout; a checkpoint is left")
    folder = watched.trainer.home / "images"
    file = write_images(folder)[151]  # not among those that are pictured, which the trainer reads itself
    process = watched.start(
        *FOLDER_RUN, f"data.root={folder}", "speed.workers=2", "speed.worker_timeout_s=10", gates=[1]
    )  # fmt: skip
    with watched.standing_at(process, 1):
        file.unlink()
        os.mkfifo(file)
    watched.wait_for(process, lambda: len(children(process.pid)) >= 2)
    below = descendants(process.pid)
    failed = watched.finish(process).check(1)
    row.times += 1
    assert len(failed.errors) == 1
    assert lines_with(failed.errors[0], "no batch for 10 s: worker ", str(file))
    assert watched.step == watched.witness.newest_step() + 1
    assert_gone(below)
