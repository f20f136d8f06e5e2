"""Whether a run is going: by its lock, whatever its last process left behind."""

import fcntl
import os
from pathlib import Path

import pytest

from fastjepa.report.load import Metrics, Run, Summary
from fastjepa.report.status import status_of

ROWS: Metrics = [{"step": s, "images": 64 * s, "images_per_second": 128.0} for s in (1, 50, 100)]


def run(steps: int | None = 0, planned: int | None = 300, rows: Metrics = ROWS) -> Run:
    return Run("", rows, Summary("run", steps=steps, planned_steps=planned), [], [])


def test_a_run_is_going_while_its_lock_is_held(tmp_path: Path) -> None:
    with (tmp_path / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        status = status_of(tmp_path, run())
        assert (status.state, status.step, status.planned) == ("going", 100, 300)
        assert status.left_s == pytest.approx(200 * 64 / 128)
        assert (
            status_of(tmp_path, run(steps=300, rows=[{"step": 300}])).state == "ended"
        )  # writing its report
        assert status_of(tmp_path, run(rows=[])).left_s is None
        assert status_of(tmp_path, run(planned=None)).left_s is None
    assert status_of(tmp_path, run()).state == "broken off"


def test_looking_keeps_no_run_out(tmp_path: Path) -> None:
    (tmp_path / ".lock").touch()
    status_of(tmp_path, run())
    with (tmp_path / ".lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_a_run_that_was_told_to_stop_is_no_wreck(tmp_path: Path) -> None:
    assert status_of(tmp_path, run()).state == "broken off"
    (tmp_path / "stopped").write_text("Stopped at step 100 of 300\n")
    assert status_of(tmp_path, run()).state == "stopped"


def test_a_run_that_goes_on_after_its_end_has_not_ended(tmp_path: Path) -> None:
    assert status_of(tmp_path, run(steps=100, planned=100)).state == "ended"
    assert status_of(tmp_path, run(steps=100, planned=None)).state == "ended"  # of an older version
    assert status_of(tmp_path, run(steps=100, planned=200)).state == "broken off"
    assert status_of(tmp_path, run(steps=50, planned=None)).state == "broken off"


def test_without_locks_a_recent_row_is_a_sign_of_life(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", refuse)
    (tmp_path / ".lock").touch()
    (tmp_path / "metrics.jsonl").touch()
    assert status_of(tmp_path, run()).state == "going"
    os.utime(tmp_path / "metrics.jsonl", (0, 0))
    assert status_of(tmp_path, run()).state == "broken off"
