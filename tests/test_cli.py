"""The `fastjepa` command."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

from fastjepa import __version__
from fastjepa.cli import main
from fastjepa.interop import load_official
from fastjepa.interop.start import load_trained

if TYPE_CHECKING:
    from tests.conftest import Trainer


@pytest.fixture(scope="module")
def run(trainer_at: "Callable[[Path], Trainer]", tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run, trained by `fastjepa train`."""
    trainer = trainer_at(tmp_path_factory.mktemp("cli"))
    command = [sys.executable, "-m", "fastjepa.cli", "train", "--config", str(trainer.write_config())]
    done = subprocess.run(
        [*command, "optim.steps=7"], env=trainer.environment, capture_output=True, text=True, timeout=150
    )
    assert done.returncode == 0, done.stderr
    assert trainer.saved_steps == [5, 7]
    return trainer.run


def test_report_is_written_again(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = run / "report" / "index.html"
    page.unlink()
    assert main(["report", str(run)]) == 0
    assert capsys.readouterr().out == f"Report: {page}\n"
    assert page.read_text().startswith("<!doctype html>")


@pytest.mark.parametrize("source", ["", "checkpoints/step_00000007", "checkpoints/step_00000005"])
def test_export_writes_what_was_trained(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], source: str
) -> None:
    file = tmp_path / "out.pth.tar"
    assert main(["export", str(run / source), str(file)]) == 0
    step = source[-8:] or "00000007"
    assert capsys.readouterr().out == f"Wrote {file}, from {run / 'checkpoints' / f'step_{step}'}\n"
    exported = load_official(file, heads=2).state_dict()
    trained, _ = load_trained(run / source)
    assert exported.keys() == trained.state_dict().keys()
    assert all(torch.equal(exported[name], tensor) for name, tensor in trained.state_dict().items())
    encoder, target = exported["encoder.norm.weight"], exported["target_encoder.norm.weight"]
    assert not torch.equal(encoder, target), "one was taken for the other"


def test_export_does_not_overwrite_unasked(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "mine.pth.tar"
    file.write_text("mine")
    assert main(["export", str(run), str(file)]) == 1
    assert capsys.readouterr().err == f"error: {file} exists; give another name, or --force to replace it\n"
    assert file.read_text() == "mine"
    assert main(["export", str(run), str(file), "--force"]) == 0
    assert load_official(file, heads=2)


def test_what_cannot_be_exported(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for source, file, said in (
        (tmp_path, tmp_path / "a", f"{tmp_path} is no checkpoint, and no run folder with one"),
        (tmp_path / "nowhere", tmp_path / "a", "is no checkpoint, and no run folder with one"),
        (run, tmp_path / "no" / "a", f"there is no folder {tmp_path / 'no'} to write a into"),
        (run, tmp_path, f"cannot write {tmp_path}: "),
    ):
        assert main(["export", str(source), str(file), "--force"]) == 1
        err = capsys.readouterr().err
        assert err.startswith("error: ")
        assert said in err
    assert list(tmp_path.iterdir()) == []


def test_report_of_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(tmp_path / "nowhere")]) == 1
    assert capsys.readouterr().err.startswith(f"error: {tmp_path / 'nowhere'} is not a folder")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [(["--help"], "export"), (["--version"], __version__), (["train", "--help"], "usage: fastjepa train")],
)
def test_help(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 0
    assert said in capsys.readouterr().out


def test_train_passes_its_arguments_on(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--print-config", "optim.lr=0.25"]) == 0
    assert "lr: 0.25" in capsys.readouterr().out
    assert main(["train", "optim.rate=1"]) == 1
    assert capsys.readouterr().err.startswith("error: unknown key optim.rate")


WITHOUT_EXTRAS = """
import sys

class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {"deepspeed", "yaml", "rich", "matplotlib", "PIL"}:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Missing())
from fastjepa.cli import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["--help"], 0),
        (["train", "optim.lr=1"], 1),
        (["report", "."], 1),
        (["export", ".", "x"], 1),
        (["probe", "."], 1),
    ],
)
def test_without_the_train_extra(tmp_path: Path, arguments: list[str], code: int) -> None:
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_EXTRAS, *arguments],
        cwd=tmp_path,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == code
    if code:
        assert done.stderr.startswith("error: this needs ")
        assert "pip install 'fastjepa[train]'" in done.stderr
        assert done.stderr.count("\n") == 1
