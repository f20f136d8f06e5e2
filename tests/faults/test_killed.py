"""SIGKILL, at whatever moment: the same command ends as if nothing had happened."""

import random
import signal
import subprocess
import time
from collections.abc import Callable

import pytest

from tests.faults.evidence import RUN, STEPS, Watched, lines_with, results
from tests.faults.table import Row

KILLS = 5  # of a run


def kill(watched: Watched, process: subprocess.Popen[str]) -> str:
    """Kill it; what it had said."""
    process.send_signal(signal.SIGKILL)
    ended = watched.finish(process)
    assert ended.code == -signal.SIGKILL
    return ended.out


def wait_for_moment(
    moment: str, chance: random.Random, watched: Watched, process: subprocess.Popen[str]
) -> None:
    """Until it is time to kill the process, which stands before its last step if it gets there."""
    later = watched.trainer.saved_steps[-1] if watched.trainer.saved_steps else 0
    # Not far, so that there are steps left for the other kills.
    step = later + chance.randrange(1, STEPS // (KILLS + 1))
    match moment:
        case "starting":
            time.sleep(chance.uniform(0, 4))
        case "training":
            assert watched.wait_for(process, lambda: watched.witness.newest_step() >= min(step, STEPS - 1))
        case "saving":
            wait_for_save(step, watched, process)


def wait_for_save(step: int, watched: Watched, process: subprocess.Popen[str]) -> None:
    """Until a checkpoint of that step or a later one is half there, or the process stands at the last."""

    def is_time() -> bool:
        newest = watched.witness.newest_step()
        return newest == STEPS - 1 or (newest >= step and any(watched.checkpoints.glob("step_*.tmp")))

    assert watched.wait_for(process, is_time)


@pytest.mark.parametrize("run", [0, *(pytest.param(n, marks=pytest.mark.slow_fault) for n in (1, 2, 3))])
def test_killed_and_resumed(
    watched: Watched,
    uninterrupted: Callable[..., Watched],
    table: Callable[[str, str], Row],
    chance: random.Random,
    run: int,
) -> None:
    reference = uninterrupted(*RUN)
    row = table("SIGKILL at random, then the same command", "resumes; no checkpoint is damaged")
    moments = ["starting", "training", "training", "saving", chance.choice(["starting", "saving"])]
    chance.shuffle(moments)
    for moment in moments:
        process = watched.start(*RUN, gates=[STEPS - 1])
        wait_for_moment(moment, chance, watched, process)
        said = kill(watched, process)
        row.times += 1
        assert lines_with(said, "warning:") == []
    watched.witness.gate(STEPS - 1).unlink()

    with (watched.trainer.run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 12, "lo')  # as a process may leave it that is killed while it writes
    resumed = watched(*RUN).check()
    assert lines_with(resumed.out, "warning:") == []
    row.hold_against(watched, reference)
    assert results(watched.trainer) == results(reference.trainer)


@pytest.mark.slow_fault
def test_killed_while_saving(
    watched: Watched,
    uninterrupted: Callable[..., Watched],
    table: Callable[[str, str], Row],
    chance: random.Random,
) -> None:
    """What is half there when the process is gone is no checkpoint, and is cleared away."""
    often = (*RUN[:2], "run.save_every=1", *RUN[3:])
    reference = uninterrupted(*RUN)
    row = table("SIGKILL during a save, then the same command", "resumes; no checkpoint is damaged")
    for _ in range(12):
        step = chance.randrange(2, 12) + (watched.trainer.saved_steps or [0])[-1]
        process = watched.start(*often, gates=[STEPS - 1])
        wait_for_save(step, watched, process)
        said = kill(watched, process)
        assert lines_with(said, "warning:") == []
        row.times += any(watched.checkpoints.glob("step_*.tmp"))  # else it was renamed just before
        if row.times == 5:
            break
    assert row.times, "no save was interrupted"
    watched.witness.gate(STEPS - 1).unlink()
    assert lines_with(watched(*often).check().out, "warning:") == []
    assert not list(watched.checkpoints.glob("*.tmp"))
    row.hold_against(watched, reference)
