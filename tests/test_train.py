"""A run from its first step to its report, and what it says on the way."""

import json
import os
import pty
import re
import signal
import struct
import sys
import termios
from collections.abc import Callable
from fcntl import ioctl
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

from fastjepa.engine import single
from fastjepa.engine.single import SingleDevice
from fastjepa.train import main

if TYPE_CHECKING:
    from tests.conftest import Finished, Trainer

# DESIGN.md's, on every logged step, and those of the steps that are probed too.
LOGGED = {
    "step", "epoch", "images", "loss", "lr", "weight_decay", "momentum", "grad_norm", "images_per_second",
    "data_wait_fraction", "context_tokens", "target_tokens", "target_std",
}  # fmt: skip
PROBED = {"rankme", "knn_top1", "linear_top1"}


@pytest.fixture(scope="module")
def finished(
    trainer_at: "Callable[[Path], Trainer]", tmp_path_factory: pytest.TempPathFactory
) -> "tuple[Trainer, Finished]":
    trainer = trainer_at(tmp_path_factory.mktemp("finished"))
    return trainer, trainer(
        "optim.steps=23", "probe.every_steps=10", "run.keep_last=3", "run.report=true", "probe.at_ends=true"
    ).check()


def test_metrics_have_one_row_for_each_logged_step(finished: "tuple[Trainer, Finished]") -> None:
    rows = finished[0].rows
    assert [row["step"] for row in rows] == [1, 5, 10, 15, 20, 23]
    for row in rows:
        assert row.keys() >= LOGGED
        assert (row.keys() >= PROBED) == (row["step"] in (10, 20, 23))
        assert row["images"] == 16 * row["step"]
        assert row["epoch"] == pytest.approx(row["images"] / 280)
        assert row["context_tokens"] == 10
        assert 0 <= row["data_wait_fraction"] <= 1
    assert rows[-1]["lr"] == pytest.approx(1e-6)


def test_run_folder_holds_what_was_promised(finished: "tuple[Trainer, Finished]") -> None:
    trainer, _ = finished
    assert trainer.saved_steps == [15, 20, 23]
    names = {path.name for path in trainer.run.rglob("*")}
    assert {"config.yaml", "metrics.jsonl", "checkpoints", "report", "index.html", "summary.json"} <= names
    assert not [name for name in names if name.endswith((".tmp", ".pt", ".pth", ".pkl", ".bin"))]
    probed = json.loads((trainer.run / "report" / "summary.json").read_text())["probe"]
    assert [row["name"] for row in probed] == [
        "raw pixels",
        "untrained encoder",
        "trained target encoder",
        "trained context encoder",
    ]


def test_ends_are_judged_where_that_is_wanted(train: "Trainer") -> None:
    done = train("optim.steps=10", "probe.every_steps=5").check()
    assert done.out.startswith("not judged at the start and the end, since probe.at_ends is false\n")
    assert [row["step"] for row in train.rows if "knn_top1" in row] == [5, 10]
    summary = train.run / "report" / "summary.json"
    assert json.loads(summary.read_text())["probe"] == []

    train("optim.steps=10", "probe.every_steps=5", "probe.at_ends=true").check()
    probed = [row["name"] for row in json.loads(summary.read_text())["probe"]]
    assert probed == ["raw pixels", "untrained encoder", "trained target encoder", "trained context encoder"]


def test_baselines_are_judged_as_along_the_way_too(train: "Trainer") -> None:
    train(
        "optim.steps=5", "probe.every_steps=5", "probe.at_ends=true", "probe.bank=30", "probe.queries=40"
    ).check()
    summary = json.loads((train.run / "report" / "summary.json").read_text())
    along, full = summary["probe_along"], summary["probe"][:2]
    assert [row["name"] for row in along] == ["raw pixels", "untrained encoder"]
    assert all((40 * row["knn_top1"]).is_integer() for row in along)
    assert along[0]["rankme"] < full[0]["rankme"]  # of fewer images


def test_piped_output_is_plain_lines_of_the_run_alone(finished: "tuple[Trainer, Finished]") -> None:
    _, process = finished
    assert process.err == ""
    assert "\x1b" not in process.out
    lines = process.out.splitlines()
    assert lines[0] == "judged on 50 training images, held out"
    assert "Runs alone, without DeepSpeed, on the CPU; no CUDA graph; the target encoder in fp32" in lines
    assert lines[-1].startswith("Report: ")
    ours = re.compile(
        r"judged on |Runs |step +\d+/23  loss |step \d+  [a-z ]+: kNN |features  |raw |(un)?trained |Report: "
    )
    assert [line for line in lines if not ours.match(line)] == []


def test_a_finished_run_ends_again_at_once_and_changes_nothing(
    finished: "tuple[Trainer, Finished]",
) -> None:
    trainer, _ = finished
    rows, saved = trainer.rows, weights(trainer.run)
    again = trainer("optim.steps=23", "probe.every_steps=10", "run.keep_last=3", "run.report=true").check()
    assert "Resuming at step 23 of 23" in again.out
    assert trainer.rows == rows
    assert weights(trainer.run) == saved


def test_a_skip_in_the_last_step_is_told_of_where_the_host_hears_late(
    train: "Trainer", monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As on a GPU, of which the host hears one step later; here in this process, on the CPU."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    before = dict(os.environ)
    handlers = {
        number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
    }
    begin, step = single._Late.__init__, SingleDevice.step

    def late(self: single._Late, device: torch.device) -> None:
        begin(self, device)
        self.lag = 1

    def spoiled(self: SingleDevice) -> None:
        if self.count_updates() == 5:
            self._sum[0] = torch.inf
        step(self)

    monkeypatch.setattr(single._Late, "__init__", late)
    monkeypatch.setattr(SingleDevice, "step", spoiled)
    try:
        assert main(["--config", str(train.write_config()), "optim.steps=6", "speed.workers=0"]) == 0
    finally:
        os.environ.clear()
        os.environ.update(before)
        for number, handler in handlers.items():
            signal.signal(number, handler)
    said = capsys.readouterr()
    assert (said.out + said.err).count("step 6: the gradients are not finite") == 1


def weights(run: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in run.glob("checkpoints/*/*.safetensors")}


@pytest.mark.skipif(sys.platform != "linux", reason="pseudo-terminals differ")
def test_live_view_on_a_terminal(train: "Trainer") -> None:
    """What is left on the screen is the lines that stay; while it ran, each number was beside its name."""
    parent, child = pty.openpty()
    ioctl(child, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 80, 0, 0))
    process = train.start(
        "optim.steps=20", "run.report=true", "probe.at_ends=true", stdout=child, stderr=child
    )
    os.close(child)
    written = bytearray()
    while True:
        try:
            written += os.read(parent, 1 << 16)
        except OSError:  # how Linux reports that the other end was closed
            break
    os.close(parent)
    assert process.wait(timeout=60) == 0

    text = written.decode().replace("\r\n", "\n")
    seen = re.sub(r"\x1b\[[\d;?]*[a-zA-Z]", "", text)
    for name in ("loss", "grad norm", "momentum", "images/s", "data wait", "target std", "kNN", "linear"):
        assert re.search(rf"{name} +[\d.,]+%?", seen), name
    assert "step 20/20, 0:00 left" in seen
    assert max(len(line) for line in seen.splitlines() if line.startswith(("│", "╭", "╰"))) == 80

    screen = what_stays(text)
    assert not [line for line in screen if "│" in line or "╭" in line]
    assert screen[0].startswith("judged on")
    assert screen[-1].startswith("Report: ")
    assert text.count("\x1b[?25l") == text.count("\x1b[?25h"), "the cursor is gone"


def what_stays(text: str) -> list[str]:
    """The lines on a terminal that understands what rich writes: cursor up, erase line, carriage return."""
    lines, row = [""], 0
    for token in re.findall(r"\x1b\[[\d;?]*[a-zA-Z]|\n|\r|[^\x1b\n\r]+", text):
        if token == "\n":
            row += 1
            lines += [""] * (row == len(lines))
        elif token.endswith("A") and token.startswith("\x1b"):
            row -= int(token[2:-1] or 1)
        elif token == "\x1b[2K":
            lines[row] = ""
        elif not token.startswith(("\x1b", "\r")):
            lines[row] += token
    return [line for line in lines if line.strip()]
