"""Real runs to which something happens that they get over: a bad step, a dead worker, a disk without room."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

from fastjepa.engine.checkpoints.verify import newest_good
from fastjepa.engine.single import SingleDevice
from fastjepa.train import main
from tests.faults.evidence import Watched, Witness

if TYPE_CHECKING:
    from tests.conftest import Trainer


def wait_until(
    is_true: Callable[[], object], process: "subprocess.Popen[str]", timeout_s: float = 120
) -> None:
    deadline_s = time.monotonic() + timeout_s
    while not is_true():
        assert process.poll() is None, f"it ended: {process.communicate()}"
        assert time.monotonic() < deadline_s, "in vain"
        time.sleep(0.01)


def test_a_loss_that_is_no_number_costs_its_step_and_its_images_are_named(
    train: "Trainer", monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of one micro-batch of two, here in this process."""
    before = dict(os.environ)
    numbers = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
    handlers = {number: signal.getsignal(number) for number in numbers}
    honest, seen = SingleDevice.backward, 0

    def backward(self: SingleDevice, loss: torch.Tensor) -> None:
        nonlocal seen
        seen += 1
        if seen in (5, 12):  # of steps 3 and 6
            with torch.no_grad():
                loss.fill_(torch.nan)  # what is recorded of it
            loss = loss * torch.nan
        honest(self, loss)

    monkeypatch.setattr(SingleDevice, "backward", backward)
    arguments = ["--config", str(train.write_config()), "optim.steps=10", "speed.accumulation=2"]
    try:
        assert main([*arguments, "run.max_bad_steps=2"]) == 0
    finally:
        os.environ.clear()
        os.environ.update(before)
        for number, handler in handlers.items():
            signal.signal(number, handler)
    said = capsys.readouterr().out
    for step in (3, 6):
        line = (
            f"step {step}: the gradients are not finite; the weights stay as they were. It was on the images "
        )
        assert said.count(line) == 1
    assert "train-images-idx3-ubyte.gz[" in said
    assert "skipped 2" in said
    assert {row["step"]: row["skipped_steps"] for row in train.rows if "loss" in row} == {1: 0, 5: 1, 10: 2}
    assert all(row["loss"] > 0 for row in train.rows if "loss" in row)
    assert train.saved_steps == [5, 10]


def children(pid: int) -> list[int]:
    return list(map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split()))


@pytest.mark.skipif(sys.platform != "linux", reason="finds processes in /proc")
def test_a_worker_that_is_killed_costs_nothing(train: "Trainer", trainer_at: Any, tmp_path: Path) -> None:
    settings = ("optim.steps=20", "run.log_every=1")
    watched = Watched(train, Witness(train.home / "witness"))
    process = watched.start(*settings, "speed.workers=2", gates=[10])
    with watched.standing_at(process, 10):
        worker = children(process.pid)[0]
        os.kill(worker, signal.SIGKILL)
    done = train.finish(process).check()
    said = done.out + done.err
    assert said.count(f"(process {worker}) was killed by SIGKILL") == 1
    assert "new workers go on with the same images (death 1)" in said
    (tmp_path / "whole").mkdir()
    whole = trainer_at(tmp_path / "whole")
    whole(*settings).check()
    assert [row["loss"] for row in train.rows] == [row["loss"] for row in whole.rows]


def can_mount(folder: Path) -> bool:
    if sys.platform != "linux" or shutil.which("unshare") is None or shutil.which("nsenter") is None:
        return False
    command = ["unshare", "-m", "mount", "-t", "tmpfs", "tmpfs", str(folder)]
    return subprocess.run(command, capture_output=True).returncode == 0


# In a mount namespace of its own, which is gone with it: a drive of 1 MB at the run folder, and what is on
# it at the end copied out.
ON_A_SMALL_DRIVE = """
run=$1 out=$2; shift 2
mkdir -p "$run" && mount -t tmpfs -o size=1m tmpfs "$run" || exit 99
"$@"; status=$?
cp -r "$run" "$out"
exit $status
"""


def test_a_full_and_then_a_read_only_drive_are_gone_through(train: "Trainer", tmp_path: Path) -> None:
    if not can_mount(tmp_path):
        pytest.skip("needs to mount a drive: root on Linux, with unshare and nsenter")
    out, said_at = tmp_path / "out", tmp_path / "said"
    script = ("unshare", "-m", "sh", "-c", ON_A_SMALL_DRIVE, "sh", str(train.run), str(out), sys.executable)
    with said_at.open("w") as stdout:
        process = train.start(
            "optim.steps=100000", "run.log_every=2", "run.save_every=4", "probe.every_steps=0",
            launcher=script, stdout=stdout,
        )  # fmt: skip
    inside = Path(f"/proc/{process.pid}/root{train.run}")

    def said(text: str, times: int = 1) -> Callable[[], bool]:
        return lambda: said_at.read_text().count(text) >= times

    def mount(command: str) -> None:
        subprocess.run(["nsenter", "-t", str(process.pid), "-m", "sh", "-c", command], check=True)

    wait_until(lambda: newest_good(inside / "checkpoints")[0], process)
    filler = inside / "filler"
    with suppress(OSError):
        filler.write_bytes(bytes(1 << 20))
    wait_until(said("metrics.jsonl: No space left on device; training goes on without it"), process)
    wait_until(said("warning: checkpoint not written: "), process)
    filler.unlink()
    wait_until(said("metrics.jsonl can be written again; "), process)
    wait_until(said("checkpoints can be written again; "), process)

    mount(f"mount --bind {train.run} {train.run} && mount -o remount,ro,bind {train.run}")
    wait_until(said("metrics.jsonl: Read-only file system; training goes on without it"), process)
    wait_until(said("warning: checkpoint not written: ", 2), process)
    steps = said_at.read_text().count("step ")
    wait_until(lambda: said_at.read_text().count("step ") > steps + 5, process)  # of which nothing is said
    mount(f"umount {train.run}")
    wait_until(said("checkpoints can be written again; ", 2), process)

    os.kill(children(process.pid)[0], signal.SIGTERM)
    train.finish(process).check()
    text = said_at.read_text()
    assert text.count("training goes on without it") == 2
    assert text.count("metrics.jsonl can be written again; ") == 2
    assert text.count("checkpoint not written") == 2
    found, damaged = newest_good(out / "checkpoints")
    assert damaged == []
    steps_logged = [json.loads(line)["step"] for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert steps_logged == [1, *range(2, steps_logged[-1] + 1, 2)]
    assert found is not None
    assert int(found.name[5:]) - steps_logged[-1] in (0, 1)
