"""What is said of hosts and drives, large and small."""

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from fastjepa.diagnosis import check_machine as check
from fastjepa.engine.processes.files import BESIDES, files_needed, most_ranks
from tests.diagnosis.machines import DRIVE, HOST, WANTS

EIGHT = replace(WANTS, ranks=8)


def test_nothing_is_wrong_with_a_good_machine() -> None:
    findings = [
        check.check_files(HOST, WANTS),
        check.check_shared_memory(HOST, WANTS),
        check.check_cores(HOST, WANTS),
        check.check_memory(HOST, WANTS),
        check.check_drive(DRIVE, WANTS),
        check.check_drive_rate(DRIVE, WANTS, 1000.0),
        check.check_files(HOST, None),
        check.check_shared_memory(HOST, None),
        check.check_cores(HOST, None),
        check.check_drive(DRIVE, None),
    ]
    assert [finding for finding in findings if finding is None or finding.level != "ok"] == []


def test_files_of_workers() -> None:
    """One process does not raise its soft limit; several do."""
    low = replace(HOST, soft_files=256)
    many = replace(WANTS, workers=32)
    alone = check.check_files(low, many)
    assert alone.level == "fail"
    assert alone.do == f"ulimit -n {32 * check.FILES_PER_WORKER + BESIDES}, or lower speed.workers"
    none = check.check_files(replace(HOST, soft_files=64), replace(WANTS, workers=0))
    assert none.what == f"64 allowed (ulimit -n), and a run may need {BESIDES}"
    assert none.do == f"ulimit -n {BESIDES}"
    assert check.check_files(low, replace(many, ranks=8)).level == "ok"
    assert check.check_files(replace(low, soft_files=None), many).level == "ok"
    assert check.check_files(replace(low, soft_files=1024), WANTS).level == "ok"


def test_files_of_ranks() -> None:
    host = replace(HOST, hard_files=files_needed(64) - 1)  # which the trainer refuses
    finding = check.check_files(host, replace(WANTS, ranks=64, workers=0))
    assert finding.level == "fail"
    assert f"may need {files_needed(64)}" in finding.what
    assert "-Hn" in finding.what


@given(st.integers(BESIDES, 10**6))
def test_most_ranks_are_those_that_the_files_suffice_for(files: int) -> None:
    ranks = most_ranks(files)
    assert files_needed(ranks) <= files or ranks == 1
    assert files_needed(ranks + 1) > files


@given(
    ranks=st.integers(1, 8),
    workers=st.integers(1, 64),
    batch_bytes=st.integers(10**5, 10**9),
    free=st.integers(0, 10**11),
)
def test_shared_memory(ranks: int, workers: int, batch_bytes: int, free: int) -> None:
    """What is proposed where it is too small does fit."""
    wants = replace(WANTS, ranks=ranks, workers=workers, batch_bytes=batch_bytes)
    host = replace(HOST, shared_bytes=free)
    finding = check.check_shared_memory(host, wants)
    if finding.level == "ok":
        return
    assert finding.level == "fail"
    fewer = int(finding.do.rpartition("speed.workers=")[2])
    assert fewer < workers
    assert check.check_shared_memory(host, replace(wants, workers=fewer)).level == "ok"
    gib = int(finding.do.partition("--shm-size=")[2].partition("g")[0])
    assert check.check_shared_memory(replace(host, shared_bytes=gib * 2**30), wants).level == "ok"


def test_shared_memory_of_a_container() -> None:
    """Docker gives 64 MB."""
    docker = replace(HOST, shared_bytes=64 * 2**20)
    assert check.check_shared_memory(docker, WANTS).level == "fail"
    assert check.check_shared_memory(docker, replace(WANTS, workers=0)).level == "ok"
    assert check.check_shared_memory(replace(HOST, shared_bytes=None), WANTS).level == "ok"


def test_cores() -> None:
    finding = check.check_cores(HOST, EIGHT)
    assert finding.level == "warn"
    assert "speed.workers=1" in finding.do


def test_memory() -> None:
    for available, level in ((1_000_000_000, "fail"), (2_000_000_000, "warn"), (4_000_000_000, "ok")):
        assert check.check_memory(replace(HOST, memory_bytes=available), WANTS).level == level


def test_a_drive_that_is_too_small() -> None:
    """A new checkpoint is whole before the oldest goes: two that stay need room for three."""
    one = WANTS.checkpoint_bytes
    assert check.check_drive(replace(DRIVE, free_bytes=3 * one), WANTS).level == "ok"
    small = check.check_drive(replace(DRIVE, free_bytes=3 * one - 1), WANTS)
    assert small.level == "fail"
    assert "run.keep_last=1" in small.do
    tiny = check.check_drive(replace(DRIVE, free_bytes=one), WANTS)
    assert "keep_last=" not in tiny.do
    resumed = replace(DRIVE, free_bytes=one, saved_bytes=2 * one)
    assert check.check_drive(resumed, WANTS).level == "ok"
    for_ever = check.check_drive(replace(DRIVE, free_bytes=10 * one), replace(WANTS, kept=20))
    assert for_ever.level == "warn"
    assert "run.keep_every" in for_ever.do


def test_a_drive_that_takes_nothing() -> None:
    finding = check.check_drive(replace(DRIVE, error="Read-only file system"), WANTS)
    assert finding.level == "fail"
    assert "Read-only file system" in finding.what
    assert "run.dir" in finding.do


def test_a_slow_drive() -> None:
    slow = replace(DRIVE, bytes_per_second=1e6)  # 1,500 s for a checkpoint
    finding = check.check_drive_rate(slow, WANTS, 2048.0)  # one is due every 1,000 s
    assert finding is not None
    assert finding.level == "warn"
    patient = check.check_drive_rate(slow, WANTS, 1000.0)
    assert patient is not None
    assert patient.level == "ok"
    assert check.check_drive_rate(replace(DRIVE, bytes_per_second=None), WANTS, 1.0) is None


def test_sizes() -> None:
    assert [check.size(n) for n in (1500, 38_535_168, 1.5e9, 2e12)] == ["1.5 KB", "38.5 MB", "1.5 GB", "2 TB"]
