"""Which rank is lost, and that every other process ends: with real processes, which train nothing."""

import ctypes
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest

from fastjepa.engine.processes.activity import Activity, Doing, Moment
from fastjepa.engine.processes.launchers import Placement
from fastjepa.engine.processes.rendezvous import Member, meet
from fastjepa.engine.processes.verdicts import LONGER, STARTING_LONGER, Peer, silent, stuck
from fastjepa.engine.processes.watch import Guest, Host, Watch
from tests.ranks import free_port

DEAD_AFTER_S, HANG_AFTER_S = 4.0, 6.0


NOW_S = 100_000.0


def peer(
    rank: int,
    moves: int = 5,
    doing: Doing = Doing.COMPUTING,
    still_s: float = 0,
    silent_s: float = 0,
    **more: object,
) -> Peer:
    moment = Moment(7, doing, moves)
    found = Peer(Member(rank, f"node{rank}", 100 + rank), moment, NOW_S - silent_s, NOW_S - still_s, True)
    vars(found).update(more)
    return found


def test_ranks_not_heard_from_are_named() -> None:
    peers = [
        peer(0),
        peer(1, silent_s=29),
        peer(2, silent_s=31),
        peer(3, silent_s=32),
        peer(4, silent_s=99, left=True),
    ]
    verdict = silent(peers, NOW_S, 30)
    assert verdict is not None
    assert verdict.ranks == (2, 3)
    assert verdict.text.startswith(
        "rank 2 (node2, process 102) has not been heard from for more than 30 s; it was computing, after "
        "step 7; nor have rank 3 (node3, process 103)."
    )
    assert silent(peers[:2], NOW_S, 30) is None


def test_a_rank_that_starts_may_be_silent_for_longer() -> None:
    """Not one that was never in touch: what is slow comes after that."""
    limit_s = 30 * STARTING_LONGER
    starting = [
        peer(1, 0, Doing.STARTING, silent_s=limit_s - 1),
        peer(2, 0, Doing.STARTING, silent_s=limit_s),
    ]
    verdict = silent(starting, NOW_S, 30)
    assert verdict is not None
    assert verdict.ranks == (2,)
    assert f"for more than {limit_s} s; it was starting, after step 7" in verdict.text
    verdict = silent([peer(3, 0, Doing.STARTING, silent_s=31, met=False)], NOW_S, 30)
    assert verdict is not None
    assert "for more than 30 s; it was starting" in verdict.text


@pytest.mark.parametrize(
    ("peers", "guilty"),
    [
        ([peer(0, 9, Doing.AGREEING, 700), peer(1, 8, Doing.LOADING, 700)], (1,)),
        ([peer(0, 9, Doing.AGREEING, 500), peer(1, 8, Doing.LOADING, 500)], None),
        # Rank 0 has gone on to wait, but the one it waits for has only just come to where it is.
        ([peer(0, 9, Doing.AGREEING, 700), peer(1, 8, Doing.COMPUTING, 1)], None),
        # Within a step the one that is in no collective is the one the other waits for.
        ([peer(0, 8, still_s=700, in_collective=True), peer(1, 8, still_s=700)], (1,)),
        ([peer(0, 8, still_s=700, in_collective=True), peer(1, 8, still_s=700, in_collective=True)], (0, 1)),
        # Saving and judging may take longer, not for ever.
        ([peer(0, 8, Doing.ON_MAIN, 700), peer(1, 10, Doing.AGREEING, 700)], None),
        ([peer(0, 8, Doing.ON_MAIN, 600 * LONGER), peer(1, 10, Doing.AGREEING, 600 * LONGER)], (0,)),
        # Who has left is waited for by nobody.
        ([peer(0, 9, still_s=10), peer(1, 8, still_s=700, left=True)], None),
        ([peer(0, left=True)], None),
    ],
)
def test_who_keeps_the_others_waiting(peers: list[Peer], guilty: tuple[int, ...] | None) -> None:
    verdict = stuck(peers, NOW_S, 600)
    assert (verdict and verdict.ranks) == guilty


def test_activity_counts_moves_and_returns_to_what_was_done_before() -> None:
    activity = Activity()
    activity.begin(Doing.COMPUTING, step=3, saved_step=2)
    with activity.during(Doing.AGREEING):
        assert activity.now == Moment(3, Doing.AGREEING, 2)
    assert activity.now == Moment(3, Doing.COMPUTING, 3)
    place, in_collective = activity.place()
    assert place.startswith("activity.py:")
    assert not in_collective


Behaviour = Callable[[Watch], None]


def live(watch: Watch) -> None:
    """Go on, as a rank that trains does."""
    for step in range(10_000):
        watch.activity.begin(Doing.COMPUTING, step, saved_step=4)
        time.sleep(0.01)


def wait(watch: Watch) -> None:
    watch.activity.begin(Doing.COMPUTING, 1, saved_step=0)
    watch.activity.begin(Doing.AGREEING, 1, saved_step=0)
    time.sleep(60)


def hang(watch: Watch) -> None:
    watch.activity.begin(Doing.LOADING, 1, saved_step=0)
    time.sleep(60)


def fail(watch: Watch) -> None:
    time.sleep(0.5)
    watch.leave("images cannot be read")
    os._exit(7)


def fail_to(watch: Watch) -> None:
    """Be told of it in a collective that failed."""
    time.sleep(1.5)
    watch.explain()
    os._exit(8)


def finish(watch: Watch) -> None:
    watch.activity.begin(Doing.COMPUTING, 1, saved_step=1)
    time.sleep(0.2 * (1 + watch.rank))
    watch.leave()
    os._exit(0)


def load_slowly(watch: Watch) -> None:
    """Read a library from a cold drive, by a call that keeps the interpreter's lock."""
    ctypes.PyDLL(None).sleep(int(1.5 * DEAD_AFTER_S))
    watch.activity.begin(Doing.COMPUTING, 1, saved_step=0)
    watch.leave()
    os._exit(0)


def wait_for_others(watch: Watch) -> None:
    deadline_s = time.monotonic() + 60
    while time.monotonic() < deadline_s and not all(
        p.left for p in watch.peers if p.member.rank != watch.rank
    ):
        time.sleep(0.01)
    watch.leave()
    os._exit(0)


def run_rank(rank: int, size: int, port: int, behaviour: Behaviour, log: Path, hang_after_s: float) -> None:
    os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT), 2)
    meeting = meet(Placement("test", rank, size, rank, None, "127.0.0.1", port), 30)
    limits = (Activity(), DEAD_AFTER_S, hang_after_s)
    watch = Host(meeting, *limits) if rank == 0 else Guest(rank, meeting, *limits)
    watch.start()
    log.with_suffix(".up").touch()
    behaviour(watch)


class Ranks:
    def __init__(self, home: Path, *behaviours: Behaviour, hang_after_s: float = HANG_AFTER_S) -> None:
        port, size = free_port(), len(behaviours)
        self.logs = [home / f"{rank}.log" for rank in range(size)]
        forked = multiprocessing.get_context("fork")
        self.processes: list[BaseProcess] = [
            forked.Process(
                target=run_rank, args=(rank, size, port, behaviour, log, hang_after_s), daemon=True
            )
            for rank, (behaviour, log) in enumerate(zip(behaviours, self.logs, strict=True))
        ]
        for process in self.processes:
            process.start()
        deadline_s = time.monotonic() + 60
        while not all(log.with_suffix(".up").exists() for log in self.logs):
            assert time.monotonic() < deadline_s
            time.sleep(0.01)

    def signal(self, rank: int, number: signal.Signals) -> None:
        pid = self.processes[rank].pid
        assert pid is not None
        os.kill(pid, number)

    def codes(self, but: int | None = None) -> list[int | None]:
        """Exit statuses, of all or all but one."""
        for rank, process in enumerate(self.processes):
            if rank != but:
                process.join(30)
        return [process.exitcode for process in self.processes]

    def said(self, rank: int) -> str:
        return self.logs[rank].read_text()


linux = pytest.mark.skipif(sys.platform != "linux", reason="forks")


@linux
@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_rank_ends_the_others_at_once(tmp_path: Path, victim: int) -> None:
    ranks = Ranks(tmp_path, live, live, live)
    time.sleep(2)  # until they have heard of each other's steps
    ranks.signal(victim, signal.SIGKILL)
    assert ranks.codes() == [-9 if rank == victim else 1 for rank in range(3)]
    for rank in {0, 1, 2} - {victim}:
        said = ranks.said(rank)
        assert f"error: rank {victim} (" in said
        assert (
            f"process {ranks.processes[victim].pid}) has ended without a word; it was computing, after"
            in said
        )
        assert "goes on from the checkpoint of step 4" in said


@linux
@pytest.mark.parametrize("victim", [0, 2])
def test_a_stopped_rank_is_named_and_ends_once_it_goes_on(tmp_path: Path, victim: int) -> None:
    ranks = Ranks(tmp_path, live, live, live)
    time.sleep(2)  # while they start, they may be silent for longer
    ranks.signal(victim, signal.SIGSTOP)
    try:
        codes = ranks.codes(but=victim)
        assert codes == [None if rank == victim else 1 for rank in range(3)]
        for rank in {0, 1, 2} - {victim}:
            assert f"error: rank {victim} (" in ranks.said(rank)
            assert "has not been heard from for more than 4 s; it was computing" in ranks.said(rank)
    finally:
        ranks.signal(victim, signal.SIGCONT)
    assert ranks.codes() == [1, 1, 1]


@linux
def test_a_rank_that_hangs_is_named_with_its_place(tmp_path: Path) -> None:
    ranks = Ranks(tmp_path, wait, hang)
    assert ranks.codes() == [1, 1]
    for rank in (0, 1):
        assert "error: rank 1 (" in ranks.said(rank)
        assert "has been waiting for data, after step 1, for more than 6 s, at test_watch.py:" in ranks.said(
            rank
        )
        assert "in hang; the others wait for it" in ranks.said(rank)
    assert "in hang\n" in ranks.said(1)  # the stack, of that rank alone
    assert "in wait\n" not in ranks.said(0)


@linux
def test_a_rank_that_fails_is_quoted(tmp_path: Path) -> None:
    ranks = Ranks(tmp_path, fail_to, fail, fail_to)
    assert ranks.codes() == [1, 7, 1]
    for rank in (0, 2):
        assert "error: rank 1 (" in ranks.said(rank)
        assert "cannot go on: images cannot be read" in ranks.said(rank)


@linux
def test_ranks_that_finish_one_after_another_are_not_missed(tmp_path: Path) -> None:
    ranks = Ranks(tmp_path, finish, finish, finish)
    assert ranks.codes() == [0, 0, 0]
    with suppress(FileNotFoundError):
        assert [ranks.said(rank) for rank in range(3)] == ["", "", ""]


@linux
def test_a_rank_that_loads_slowly_is_not_lost(tmp_path: Path) -> None:
    ranks = Ranks(tmp_path, wait_for_others, load_slowly, hang_after_s=60)
    assert ranks.codes() == [0, 0], ranks.said(0)
