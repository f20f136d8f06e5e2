"""SIGTERM to one rank, or to a launcher: all ranks save the same step, and nothing of the run is left.

To `deepspeed` on one node it is of no use, and the test says what happens instead.
"""

import contextlib
import os
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.faults.evidence import RUN, STEPS, TWO, Watched, lines_with, results, torchrun
from tests.faults.processes import assert_gone, children, descendants, is_alive, needs_proc, ranks_below
from tests.faults.table import Row
from tests.faults.test_bad_images import RUN as FOLDER_RUN
from tests.faults.test_bad_images import STEPS as FOLDER_STEPS
from tests.faults.test_bad_images import write_images
from tests.ranks import free_port

pytestmark = needs_proc


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


def hangs(process: "subprocess.Popen[str]") -> bool:
    """Whether something below a process waits for the other side of a FIFO."""
    with contextlib.suppress(OSError):  # one of them has just gone
        for pid in descendants(process.pid):
            if Path(f"/proc/{pid}/wchan").read_text() == "wait_for_partner":
                return True
    return False


def replace_by_fifo(file: Path) -> bytes:
    content = file.read_bytes()
    file.unlink()
    os.mkfifo(file)
    return content


def write_two_classes(folder: Path) -> list[Path]:
    files = write_images(folder)
    for number, file in enumerate(files):
        files[number] = folder / "ab"[number % 2] / file.name
        files[number].parent.mkdir(exist_ok=True)
        file.rename(files[number])
    return files


@pytest.mark.slow_fault
def test_told_to_stop_while_a_drive_hangs(watched: Watched, table: Callable[[str, str], Row]) -> None:
    """Opening a FIFO without a writer never returns, and would be waited for longer than the test lasts."""
    row = table(
        "SIGTERM while a drive hangs", "saves at once, whatever is waited for; resumes when it answers"
    )
    home = watched.trainer.home
    trained_on = write_two_classes(home / "images")[151]  # not among those that are pictured
    judged_on = write_two_classes(home / "probe")[151:153]
    overrides = (
        *FOLDER_RUN, f"data.root={home / 'images'}", f"data.probe_root={home / 'probe'}",
        "data.hold_out=0", "probe.at_ends=true", "probe.final_queries=300",
        "speed.workers=2", "speed.worker_timeout_s=600",
    )  # fmt: skip

    def stop_where(file: Path, before: int | None, said: str) -> None:
        content = replace_by_fifo(file) if before is None else b""
        process = watched.start(*overrides, gates=[] if before is None else [before])
        if before is not None:
            with watched.standing_at(process, before):
                content = replace_by_fifo(file)
        assert watched.wait_for(process, lambda: hangs(process))
        process.send_signal(signal.SIGTERM)
        row.times += 1
        stopped = watched.trainer.finish(process, timeout_s=30).check()
        assert lines_with(stopped.out, said), stopped
        assert (watched.trainer.run / "stopped").exists()
        file.unlink()
        file.write_bytes(content)

    stop_where(judged_on[0], None, f"Stopped at step 0 of {FOLDER_STEPS}")
    stop_where(trained_on, None, f"Stopped at step 0 of {FOLDER_STEPS}")  # pictures are of it too
    stop_where(trained_on, 1, "Stopped at step ")
    stop_where(judged_on[1], FOLDER_STEPS - 1, f"Stopped before it was judged, at step {FOLDER_STEPS}")
    done = watched(*overrides).check()
    assert lines_with(done.out, "trained target encoder")
    assert sorted(watched.witness.trained_on()) == list(range(FOLDER_STEPS))


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
    process = watched.start(*RUN, launcher=torchrun(2), gates=[40])
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
