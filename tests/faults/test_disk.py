"""A disk that is full, or read-only, for a while or for good: the run trains on, and keeps what it had."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from fastjepa.engine.checkpoints.verify import verify_checkpoint
from tests.faults.evidence import RUN, STEPS, TWO, Watched, lines_with, results
from tests.faults.table import Row

SIZE = "2m"  # of the disk: five checkpoints


def mount(*arguments: str) -> None:
    done = subprocess.run(["mount", *arguments], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"needs mounts: {done.stderr.strip()}")


class Disk:
    """A small disk of its own for a run folder."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.filler = path / "filler"
        self.mounts = 0
        path.mkdir()
        mount("-t", "tmpfs", "-o", f"size={SIZE}", "tmpfs", str(path))
        self.mounts += 1

    def fill(self) -> None:
        with self.filler.open("wb", buffering=0) as file:
            for piece in (4096, 1):
                try:
                    while True:
                        file.write(b"x" * piece)
                except OSError:
                    continue

    def make_room(self) -> None:
        self.filler.unlink()

    def forbid_writing(self) -> None:
        """As a drive does that has found errors. What is mounted over it is what processes now see."""
        mount("--bind", str(self.path), str(self.path))
        self.mounts += 1
        mount("-o", "remount,ro,bind", str(self.path))

    def allow_writing(self) -> None:
        subprocess.run(["umount", "--lazy", str(self.path)], check=True)
        self.mounts -= 1

    def close(self) -> None:
        while self.mounts:
            self.allow_writing()


@pytest.fixture
def disk(watched: Watched) -> Iterator[Disk]:
    if sys.platform != "linux" or os.geteuid() != 0:
        pytest.skip("mounting needs Linux and root")
    disk = Disk(watched.trainer.run)
    yield disk
    for process in watched.trainer.started:
        process.kill()
        process.wait()
    disk.close()


def at_rest(watched: Watched, process: "subprocess.Popen[str]", step: int) -> None:
    """Wait until nothing is being saved or deleted, which would make room, after the save of that step."""
    last = {f"step_{step - 5:08d}", f"step_{step:08d}"}
    assert watched.wait_for(process, lambda: {path.name for path in watched.checkpoints.iterdir()} == last)


WAYS = pytest.mark.parametrize(
    ("way", "begin", "end"),
    [
        ("full", Disk.fill, Disk.make_room),
        pytest.param("read-only", Disk.forbid_writing, Disk.allow_writing, marks=pytest.mark.slow_fault),
    ],
    ids=["full", "read_only"],
)


@WAYS
def test_the_disk_fails(
    watched: Watched,
    uninterrupted: Callable[..., Watched],
    table: Callable[[str, str], Row],
    disk: Disk,
    way: str,
    begin: Callable[[Disk], None],
    end: Callable[[Disk], None],
) -> None:
    reference = uninterrupted(*RUN)
    for_good = table(
        f"the disk is {way} until the end", "warns, trains on, keeps the last checkpoint, fails at the end"
    )
    process = watched.start(*RUN, gates=[43])
    with watched.standing_at(process, 43):
        at_rest(watched, process, 40)
        begin(disk)
    failed = watched.finish(process).check(1)
    for_good.times += 1
    assert lines_with(failed.out, "warning: checkpoint", "not written"), failed
    assert len(failed.errors) == 1
    assert "the last checkpoint could not be written" in failed.errors[0]
    assert watched.witness.newest_step() == STEPS - 1, "it trained on"
    assert watched.step == 40
    for path in watched.checkpoints.glob("step_????????"):
        verify_checkpoint(path)
    end(disk)

    for_a_while = table(f"the disk is {way} for a while", "warns once, trains on, saves again")
    process = watched.start(*RUN, gates=[63, 85])
    with watched.standing_at(process, 63):
        at_rest(watched, process, 60)
        begin(disk)
    with watched.standing_at(process, 85):
        end(disk)
    done = watched.finish(process).check()
    for_a_while.times += 1
    assert lines_with(done.out, "Resuming at step")
    assert lines_with(done.out, "warning: checkpoint", "not written"), done
    for row in (for_good, for_a_while):
        row.hold_against(watched, reference)
    assert results(watched.trainer) == results(reference.trainer)


def test_the_log_is_on_the_full_disk_as_well(
    watched: Watched,
    uninterrupted: Callable[..., Watched],
    table: Callable[[str, str], Row],
    disk: Disk,
) -> None:
    row = table("the disk is full for a while, the log on it", "trains on, saves again; no line is torn")
    reference = uninterrupted(*RUN)
    log = disk.path / "log"
    with log.open("a") as stream:
        process = watched.start(*RUN, gates=[43, 85], stdout=stream, stderr=stream)
    with watched.standing_at(process, 43):
        at_rest(watched, process, 40)
        with log.open("a") as stream:  # a page that is begun is all there: the next line is cut off in it
            stream.write("#" * (-(log.stat().st_size + 21) % 4096) + "\n")
        disk.fill()
    with watched.standing_at(process, 85):
        assert len(log.read_text().splitlines()[-1]) == 20, "it was to be cut off"
        disk.make_room()
    assert watched.finish(process).code == 0, log.read_text()
    row.times += 1
    shown = lines_with(log.read_text(), "step ", "loss")
    assert len(shown) == STEPS // 4 + 1
    assert [line for line in shown if not (line.startswith("step ") and line.endswith(" left"))] == []
    assert lines_with(log.read_text(), "warning: checkpoint", "not written")
    row.hold_against(watched, reference)
    assert results(watched.trainer) == results(reference.trainer)


@pytest.mark.slow_fault
def test_two_ranks_start_again_on_a_full_disk(
    watched: Watched, table: Callable[[str, str], Row], disk: Disk
) -> None:
    row = table("the same command while the disk is full", "resumes, warns, trains on, fails at the end")
    watched("optim.steps=10", launcher=TWO).check()
    shutil.rmtree(watched.checkpoints / "step_00000010")
    disk.fill()
    failed = watched("optim.steps=10", launcher=TWO)
    row.times += 1
    assert failed.code == 1, failed
    assert lines_with(failed.out, "Resuming at step 5 of 10"), failed
    assert lines_with(failed.out, "warning: checkpoint not written: step 10"), failed
    assert watched.witness.newest_step() == 9, "it trained on"
    assert watched.trainer.saved_steps == [5]
    disk.make_room()
    watched("optim.steps=10", launcher=TWO).check()
    assert watched.trainer.saved_steps == [5, 10]
