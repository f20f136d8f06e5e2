"""SIGTERM to one rank, or to a launcher: all ranks save the same step, and nothing of the run is left.

To `deepspeed` on one node it is of no use, and the test says what happens instead.
"""

import os
import signal
from collections.abc import Callable

import pytest

from tests.faults.evidence import RUN, STEPS, Watched, lines_with, results, torchrun
from tests.faults.processes import assert_gone, children, descendants, is_alive, needs_proc, ranks_below
from tests.faults.table import Row
from tests.ranks import free_port

pytestmark = needs_proc

TWO = tuple(torchrun(2))


def assert_saved_together(watched: Watched, said: str) -> None:
    step = watched.step
    assert step < STEPS
    assert len(lines_with(said, f"Stopped at step {step} of {STEPS}; the same command resumes.")) == 1
    assert not list(watched.checkpoints.glob("*.tmp"))


def test_one_process_is_told_to_stop(
    watched: Watched, uninterrupted: Callable[..., Watched], table: Callable[[str, str], Row]
) -> None:
    reference = uninterrupted(*RUN)
    signals = (
        (signal.SIGTERM, 0, table("SIGTERM to the only process", "saves, and ends with status 0"), ()),
        (signal.SIGINT, 130, table("Ctrl-C", "saves, and ends with status 130"), ("speed.workers=2",)),
    )
    for number, status, row, overrides in signals:
        step = 33 if number == signal.SIGTERM else 71
        process = watched.start(*RUN, *overrides, gates=[step])
        with watched.standing_at(process, step):
            process.send_signal(number)
        row.times += 1
        assert_saved_together(watched, watched.finish(process).check(status).out)
    stopped_at = watched.step
    resumed = watched(*RUN).check()
    assert lines_with(resumed.out, f"Resuming at step {stopped_at} of {STEPS}")
    for *_, row, _ in signals:
        row.hold_against(watched, reference)
    assert results(watched.trainer) == results(reference.trainer)


@pytest.mark.slow_fault
def test_sigterm_to_one_rank(
    watched: Watched, uninterrupted: Callable[..., Watched], table: Callable[[str, str], Row]
) -> None:
    row = table("SIGTERM to one rank of two", "both save the same step and end with status 0")
    for step, rank in ((20, 1), (60, 0)):
        process = watched.start(*RUN, launcher=TWO, gates=[step])
        with watched.standing_at(process, step):
            below = descendants(process.pid)
            os.kill(ranks_below(process.pid)[rank], signal.SIGTERM)
        row.times += 1
        assert_saved_together(watched, watched.finish(process).check().out)
        assert_gone(below)
    watched(*RUN, launcher=TWO).check()
    row.hold_against(watched, uninterrupted(*RUN, launcher=TWO))


@pytest.mark.slow_fault
def test_sigterm_to_torchrun(
    watched: Watched, uninterrupted: Callable[..., Watched], table: Callable[[str, str], Row]
) -> None:
    row = table("SIGTERM to torchrun", "it hands it on; all save the same step; torchrun itself fails of it")
    process = watched.start(*RUN, launcher=TWO, gates=[40])
    with watched.standing_at(process, 40):
        below = descendants(process.pid)
        process.send_signal(signal.SIGTERM)
    row.times += 1
    ended = watched.finish(process)
    assert ended.code != 0
    assert_saved_together(watched, ended.out)
    assert_gone(below)
    watched(*RUN, launcher=TWO).check()
    row.hold_against(watched, uninterrupted(*RUN, launcher=TWO))


@pytest.mark.slow_fault
def test_sigterm_to_deepspeed(
    watched: Watched, uninterrupted: Callable[..., Watched], table: Callable[[str, str], Row]
) -> None:
    to_runner = table("SIGTERM to `deepspeed` on one node", "it alone ends; its ranks train on")
    to_launch = table("SIGTERM to deepspeed's launch.py", "it hands it on; all save the same step and end")
    deepspeed = ("deepspeed", "--num_gpus", "2", "--master_port", str(free_port()), "--no_local_rank")
    process = watched.start(*RUN, launcher=deepspeed, gates=[10])
    with watched.standing_at(process, 10):
        ranks, (launch,) = ranks_below(process.pid), children(process.pid)
        below = descendants(process.pid)
        assert len(ranks) == 2
        process.terminate()
        process.wait()
        to_runner.times += 1
        assert [pid for pid in (launch, *ranks) if not is_alive(pid)] == []
        os.kill(launch, signal.SIGTERM)
        to_launch.times += 1
    said = watched.finish(process)
    assert_gone(below)
    assert_saved_together(watched, said.out)

    watched(*RUN, launcher=TWO).check()
    for row in (to_runner, to_launch):
        row.hold_against(watched, uninterrupted(*RUN, launcher=TWO))
