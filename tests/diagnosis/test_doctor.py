"""`fastjepa doctor`, from its arguments to its exit status."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from threading import Event
from typing import TYPE_CHECKING

import pytest

from fastjepa.cli import main
from fastjepa.diagnosis import feeding, machine, patience, wants
from fastjepa.diagnosis.patience import NoAnswerError, within

if TYPE_CHECKING:
    from tests.conftest import Trainer


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feeding, "_MEASURE_S", 0.1)
    monkeypatch.setattr(machine, "_PIECES", 4)


def test_a_configuration_that_runs(train: "Trainer", capsys: pytest.CaptureFixture[str]) -> None:
    config = train.write_config()
    assert main(["doctor", "--config", str(config), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["fit"] is True
    about = {finding["about"] for finding in found["findings"]}
    assert about >= {
        "torch",
        "GPUs",
        "Triton",
        "C compiler",
        "ninja",
        "DeepSpeed",
        "flash-attn",
        "torchvision",
    }
    assert about >= {
        "run folder",
        "drive",
        "shared memory",
        "open files",
        "memory",
        "images/s",
        "configuration",
    }
    assert all(finding["do"] for finding in found["findings"] if finding["level"] != "ok")
    assert sorted(train.home.iterdir()) == [config]


def test_one_that_does_not(train: "Trainer", capsys: pytest.CaptureFixture[str]) -> None:
    config = str(train.write_config())
    assert main(["doctor", "--config", config, "run.dir=/proc/run", "speed.zero_stage=2"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if line.startswith("fail  run folder      cannot write below /proc: ")]
    assert lines[-1].startswith("Failures: 1, which prevent a run. Warnings: ")


def test_a_key_that_is_misspelt(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "optim.lrr=1"]) == 1
    out = capsys.readouterr().out
    assert "fail  configuration   unknown key optim.lrr: did you mean optim.lr?" in out
    assert "open files" in out, "the machine is looked at all the same"


WITHOUT = """
import sys

class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in sys.argv[1].split(","):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Missing())
from fastjepa.cli import main
sys.exit(main(["doctor", "optim.lr=1"]))
"""


@pytest.mark.parametrize("missing", ["torch", "yaml", "PIL,rich"])
def test_it_runs_where_little_else_does(tmp_path: Path, missing: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT, missing],
        cwd=tmp_path,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stderr
    assert "fail  " in done.stdout


def test_nothing_is_waited_for_for_ever() -> None:
    release = Event()
    try:
        with pytest.raises(NoAnswerError):
            within(0.1, lambda: release.wait(60))
    finally:
        release.set()
    assert within(60, lambda: 3) == 3
    with pytest.raises(ValueError, match="own"):
        within(60, lambda: int("own"))


def test_a_store_that_never_answers(
    train: "Trainer", monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It takes connections, and says nothing."""
    monkeypatch.setattr(patience, "PATIENCE_S", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        root = f"http://127.0.0.1:{silent.getsockname()[1]}/images"
        overrides = ["data.name=shards", f"data.root={root}", "data.hold_out=0"]
        assert main(["doctor", "--config", str(train.write_config()), *overrides]) == 1
    [line] = [line for line in capsys.readouterr().out.splitlines() if line.startswith("fail")]
    assert f"the images are not open after 0.5 s: do {root} answer" in line


@pytest.mark.slow
def test_a_folder_that_takes_long_to_list_prevents_no_run(
    train: "Trainer", monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(patience, "PATIENCE_S", 0.5)
    release = Event()
    monkeypatch.setattr(wants, "open_images", lambda _config: release.wait(60))
    config = str(train.write_config())
    folder = ["data.name=folder", f"data.root={train.home}", "data.hold_out=0"]
    try:
        assert main(["doctor", "--config", config, *folder]) == 0
        assert "warn  configuration   the images are not open after 0.5 s, though" in capsys.readouterr().out
        gone = [*folder[:1], f"data.root={train.home / 'gone'}", *folder[2:]]
        assert main(["doctor", "--config", config, *gone]) == 1
    finally:
        release.set()


def test_a_drive_that_does_not_answer(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(patience, "PATIENCE_S", 0.1)
    release = Event()
    monkeypatch.setattr(machine, "_write_rate", lambda _folder: release.wait(60))
    try:
        found = machine.look_at_drive(tmp_path / "run")
    finally:
        release.set()
    assert found.error is not None
    assert found.error.startswith("no answer")
