"""A loss spike: seen in the losses, and gone back from where that is asked for."""

from collections.abc import Callable
from pathlib import Path
from statistics import fmean

import pytest

from tests.faults.evidence import RUN, STEPS, Watched, lines_with
from tests.faults.table import Row

HARM = str(Path(__file__).with_name("harm.py"))
SPIKE = 88  # from 0; the losses before say what is usual
LAUNCHER = ("python", HARM, "rate", f"{SPIKE}:3000")


@pytest.mark.slow_fault
def test_a_spike_is_told_of(watched: Watched, table: Callable[[str, str], Row]) -> None:
    row = table("a loss spike, run.on_spike=warn", "warned of, with the step and the losses")
    done = watched(*RUN, launcher=LAUNCHER).check()
    row.times += 1
    warned = lines_with(done.out, "warning:", "the loss rose from")
    assert len(warned) == 1
    step = int(warned[0].partition("at step ")[2].split()[0].rstrip(".,:"))
    assert SPIKE < step <= SPIKE + 3
    assert watched.step == STEPS


@pytest.mark.slow_fault
def test_a_spike_is_gone_back_from(
    watched: Watched, uninterrupted: Callable[..., Watched], table: Callable[[str, str], Row]
) -> None:
    row = table("a loss spike, run.on_spike=rollback", "goes back to before it, and on with other data")
    done = watched(*RUN, "run.on_spike=rollback", "run.keep_last=1", launcher=LAUNCHER).check()
    row.times += 1
    assert len(lines_with(done.out, "warning:", "the loss rose from", "going back to step 85")) == 1
    assert watched.step == STEPS
    # Every step was taken, and as well as if there had been no spike.
    ours, healthy = watched.trainer, uninterrupted(*RUN).trainer
    losses, expected = (fmean(r["loss"] for r in run.rows[-4:] if "loss" in r) for run in (ours, healthy))
    assert losses == pytest.approx(expected, rel=0.2)
