"""A run whose output nobody takes any more."""

import os
from collections.abc import Callable

import pytest

from tests.faults.evidence import RUN, Watched, results
from tests.faults.table import Row


def test_the_reader_of_the_pipe_goes(
    watched: Watched,
    uninterrupted: Callable[..., Watched],
    table: Callable[[str, str], Row],
) -> None:
    row = table("the reader of the output goes, as `head` does", "trains on, saves, and ends with status 0")
    process = watched.start(*RUN, gates=[40])
    with watched.standing_at(process, 40):
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        process.stderr.close()
    assert process.wait(300) == 0
    row.times += 1
    row.hold_against(watched, uninterrupted(*RUN))
    assert results(watched.trainer) == results(uninterrupted(*RUN).trainer)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_full_disk_below_the_log_alone(
    watched: Watched,
    uninterrupted: Callable[..., Watched],
    table: Callable[[str, str], Row],
) -> None:
    row = table("the log is on a full disk", "trains on, saves, and ends with status 0")
    with open("/dev/full", "w") as full:
        process = watched.start(*RUN, stdout=full, stderr=full)
    assert process.wait(300) == 0
    row.times += 1
    row.hold_against(watched, uninterrupted(*RUN))
