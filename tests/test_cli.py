"""The `fastjepa` command."""

import json
import os
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

from fastjepa import __version__
from fastjepa.cli import main
from fastjepa.data.fashion_mnist import FashionMNIST
from fastjepa.interop import load_encoder, load_official, save_official
from fastjepa.interop.portable import at_image_size
from fastjepa.interop.start import load_trained
from fastjepa.models import Predictor, VisionTransformer, ViTShape
from fastjepa.objectives import JEPA
from fastjepa.report.load import load_run

if TYPE_CHECKING:
    from tests.conftest import Trainer


@pytest.fixture(scope="module")
def run(trainer_at: "Callable[[Path], Trainer]", tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run, trained by `fastjepa train`."""
    trainer = trainer_at(tmp_path_factory.mktemp("cli"))
    command = [sys.executable, "-m", "fastjepa.cli", "train", "--config", str(trainer.write_config())]
    done = subprocess.run(
        [*command, "optim.steps=7", "probe.at_ends=true", "probe.every_steps=5", "probe.queries=40"],
        env=trainer.environment,
        capture_output=True,
        text=True,
        timeout=150,
    )
    assert done.returncode == 0, done.stderr
    assert trainer.saved_steps == [5, 7]
    return trainer.run


def test_a_report_that_the_run_was_told_not_to_write(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = run / "report" / "index.html"
    assert not page.exists()
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
    wrote, compared, card = capsys.readouterr().out.splitlines()
    assert wrote == f"Wrote {file}, from {run / 'checkpoints' / f'step_{step}'}"
    assert compared == f"fastjepa {__version__} reads it back: largest difference 0.0e+00, allowed 1e-05"
    assert card == f"Card: {file}.md"
    exported = load_official(file).state_dict()
    trained, _ = load_trained(run / source)
    assert exported.keys() == trained.state_dict().keys()
    assert all(torch.equal(exported[name], tensor) for name, tensor in trained.state_dict().items())
    encoder, target = exported["encoder.norm.weight"], exported["target_encoder.norm.weight"]
    assert not torch.equal(encoder, target), "one was taken for the other"


@pytest.mark.parametrize(
    ("arguments", "image_size", "which"),
    [
        ([], (28, 28), "target_encoder"),
        (["--encoder", "context", "--image-size", "56x28"], (56, 28), "encoder"),
    ],
)
def test_export_of_one_encoder(
    run: Path, tmp_path: Path, arguments: list[str], image_size: tuple[int, int], which: str
) -> None:
    """Real images, at the size asked for, through what was exported and what was trained."""
    file = tmp_path / "out.pt2"
    assert main(["export", str(run), str(file), *arguments]) == 0
    clothes = torch.nn.functional.interpolate(FashionMNIST(None, "test").images[:3].float(), image_size)
    images = clothes.to(torch.uint8)
    trained, _ = load_trained(run)
    with torch.no_grad():
        expected = at_image_size(getattr(trained, which), image_size)(images)
    tokens, features = torch.export.load(file).module()(images)
    assert (tokens - expected).abs().max() < 1e-5
    assert (features - expected.mean(dim=1)).abs().max() < 1e-5


def test_a_card_tells_of_the_run(run: Path, tmp_path: Path) -> None:
    assert main(["export", str(run), str(tmp_path / "last.safetensors")]) == 0
    text = (tmp_path / "last.safetensors.md").read_text()
    for said in (
        "| Source | step_00000007 of the run tiny |",
        "| Data | Fashion-MNIST, 280 images |",
        "| Masks | 4 target blocks of 15% to 20% of the image, context of mode `budget` |",
        "| Trained for | 7 steps, 112 images seen, of 7 steps planned |",
        "| Global batch | 16 images |",
        f"| Trained with | fastjepa {__version__}, torch {torch.__version__}",
        "| trained target encoder | ",
        "judged on 50 training images, held out",
    ):
        assert said in text
    assert str(run) not in text, "where it lies is the owner's business"
    assert "was not judged" not in text


@pytest.mark.parametrize("which", ["target", "context"])
def test_a_card_tells_which_encoder_was_judged_in_passing(run: Path, tmp_path: Path, which: str) -> None:
    """And on how many images, which are fewer than at the end."""
    source, file = run / "checkpoints" / "step_00000005", tmp_path / "5.safetensors"
    assert main(["export", str(source), str(file), "--encoder", which]) == 0
    text = (tmp_path / "5.safetensors.md").read_text()
    [row] = [row for row in load_run(run).metrics if row["step"] == 5]
    assert f"| the target encoder at step 5 | {row['knn_top1']:.1%} | {row['linear_top1']:.1%} |" in text
    assert "judged in passing, on at most 40 images, by at most 100 others." in text
    said = "The context encoder, which this is, was not judged at this step." in text
    assert said == (which == "context")


def test_a_published_file_is_exported_too(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.manual_seed(0)
    shape = ViTShape((16, 16), 8, 192, depth=1, heads=3)  # a width whose heads are known
    published = tmp_path / "published.pth.tar"
    save_official(JEPA(VisionTransformer(shape), Predictor(shape.grid, 192, 96, 1, 3)), published)
    assert main(["export", str(published), str(tmp_path / "out"), "--format", "timm"]) == 0
    out = capsys.readouterr().out
    assert f"Wrote {tmp_path / 'out'}, from {published}" in out
    assert 'timm.create_model("vit_tiny_patch16_224", img_size=(16, 16), patch_size=8' in out
    assert "normalisation is that of ImageNet" in (tmp_path / "out" / "README.md").read_text()


def test_export_does_not_overwrite_unasked(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "mine.pth.tar"
    file.write_text("mine")
    assert main(["export", str(run), str(file)]) == 1
    assert capsys.readouterr().err == f"error: {file} exists; give another name, or --force to replace it\n"
    assert file.read_text() == "mine"
    assert main(["export", str(run), str(file), "--force"]) == 0
    assert load_official(file).encoder.shape.heads == 2


def test_what_cannot_be_exported(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for source, file, said in (
        (tmp_path, tmp_path / "a.pth", f"{tmp_path} is no checkpoint, and no run folder with one"),
        (tmp_path / "nowhere", tmp_path / "a.pth", "is no checkpoint, and no run folder with one"),
        (run / "config.yaml", tmp_path / "a.pth", "config.yaml was not loaded"),
        (run, tmp_path / "no" / "a.pth", f"there is no folder {tmp_path / 'no'} to write a.pth into"),
        (run, tmp_path / "a", "a does not say its format; give --format: official (.pth.tar), transformers"),
    ):
        assert main(["export", str(source), str(file), "--force"]) == 1
        err = capsys.readouterr().err
        assert err.startswith("error: ")
        assert said in err
    for arguments, said in (
        (["--head", str(run / "config.yaml")], "config.yaml is not used as a head"),
        (["--image-size", "29"], "the nearest sizes that fit are 28 x 28"),
        (["--heads", "2"], "tells its heads itself: leave --heads out"),
    ):
        assert main(["export", str(run), str(tmp_path / "a.onnx"), *arguments]) == 1
        assert said in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("size", ["0", "-1", "a", "28x", "28x28x28", "2.5"])
def test_what_is_no_image_size(size: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["export", "run", "out.onnx", "--image-size", size])
    assert "--image-size" in capsys.readouterr().err


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_reader_that_is_gone(run: Path, tmp_path: Path, unbuffered: str) -> None:
    """As after `| head -1`: the file is there, and nothing is said."""
    file = tmp_path / "out.safetensors"
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(
        [sys.executable, "-m", "fastjepa.cli", "export", str(run), str(file)],
        stdout=writing,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONUNBUFFERED": unbuffered},
        timeout=150,
    )
    os.close(writing)
    assert done.stderr == ""
    assert done.returncode == (141 if unbuffered else 0)
    assert load_encoder(file)


def test_report_of_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(tmp_path / "nowhere")]) == 1
    assert capsys.readouterr().err.startswith(f"error: {tmp_path / 'nowhere'} is not a folder")
    assert main(["report", str(tmp_path)]) == 1
    assert "is not the folder of a run; give the folder that a run wrote" in capsys.readouterr().err
    assert not any(tmp_path.iterdir())


def test_a_report_of_a_checkpoint_is_refused_and_the_checkpoint_stays_good(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for folder in (run / "checkpoints", run / "checkpoints" / "step_00000007"):
        assert main(["report", str(folder)]) == 1
        said = capsys.readouterr().err
        assert said == f"error: {folder} is not the folder of a run; its run is {run.resolve()}\n"
    assert main(["checkpoint", "verify", str(run)]) == 0


def test_a_report_that_cannot_be_written_leaves_nothing_half_written(tmp_path: Path) -> None:
    rows = [{"step": step, "loss": 1 / step} for step in (1, 2)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    done = subprocess.run(
        [sys.executable, "-m", "fastjepa.cli", "report", str(tmp_path)],
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000)),  # as a drive with no room
        capture_output=True,
        text=True,
        timeout=150,
    )
    assert done.returncode == 1
    (said,) = done.stderr.splitlines()
    assert said.startswith(f"error: cannot write the report in {tmp_path / 'report'}: File too large; ")
    assert list((tmp_path / "report").iterdir()) == []


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


def test_train_without_a_word_of_what_to_train(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["train"])
    assert ended.value.code == 2
    assert "say what to train: --config configs/fashion_mnist.yaml" in capsys.readouterr().err


def test_as_a_module() -> None:
    done = subprocess.run([sys.executable, "-m", "fastjepa", "--version"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, f"fastjepa {__version__}\n")


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
        (["export", ".", "x.pth"], 1),
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


WITHOUT_A_TOOL = """
import sys
from importlib.machinery import PathFinder

real = PathFinder.find_spec
PathFinder.find_spec = lambda name, *rest: None if name == "onnxscript" else real(name, *rest)
from fastjepa.cli import main
sys.exit(main(sys.argv[1:]))
"""


def test_without_the_export_extra(run: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_A_TOOL, "export", str(run), "x.onnx"],
        cwd=tmp_path,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    said = "error: format onnx needs onnxscript, which is not installed: pip install 'fastjepa[export]'\n"
    assert done.stderr == said
    assert list(tmp_path.iterdir()) == []
