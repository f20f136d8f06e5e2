"""A page that follows a real run, from the command line."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.conftest import Trainer

pytestmark = pytest.mark.slow


def follow(run: Path) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-m", "fastjepa.cli", "report", str(run), "--watch", "1"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )


def wait_for(path: Path, words: str, timeout_s: float = 90) -> str:
    deadline_s = time.monotonic() + timeout_s
    while not path.exists() or words not in (text := path.read_text()):
        assert time.monotonic() < deadline_s, f"no {words!r} on the page after {timeout_s} s"
        time.sleep(0.1)
    return text


def test_it_ends_with_the_run_and_before_it_by_ctrl_c(train: "Trainer") -> None:
    process = train.start("optim.steps=100000")
    train.wait_for(process, step=10)
    page = train.run / "report" / "index.html"

    for number in (signal.SIGINT, signal.SIGTERM):
        first = follow(train.run)
        assert "Live:" in wait_for(page, "location.reload()")
        first.send_signal(number)
        out, err = first.communicate(timeout=60)
        assert (first.returncode, err) == (0, "")
        assert "The page stays as it is" in out
        assert "location.reload()" not in page.read_text()

    second = follow(train.run)
    wait_for(page, "location.reload()")
    process.send_signal(signal.SIGKILL)
    process.wait()
    out, err = second.communicate(timeout=60)
    assert (second.returncode, err) == (0, "")
    assert "The run has broken off at step" in out
    text = page.read_text()
    assert "Broken off:" in text
    assert "location.reload()" not in text
    assert not list(page.parent.glob("*.tmp"))


def test_no_folder_is_refused(tmp_path: Path) -> None:
    process = follow(tmp_path / "nowhere")
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1
    assert err.startswith("error: ")
