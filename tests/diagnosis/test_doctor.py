"""`fastjepa doctor`, from its arguments to its exit status."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from fastjepa.cli import main
from fastjepa.diagnosis import feeding, machine

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
