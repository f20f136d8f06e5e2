"""What a person gets wrong: one clear line, an exit status, and nothing half-written."""

import os
import resource
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from PIL import Image

from fastjepa.engine.checkpoints.verify import newest_good, verify_checkpoint
from fastjepa.train import main

if TYPE_CHECKING:
    from tests.conftest import Trainer

Refuse = Callable[..., str]


@pytest.fixture
def refuse(train: "Trainer", capsys: pytest.CaptureFixture[str]) -> Iterator[Refuse]:
    """Start a run in this process that must be refused before it begins; what it says."""
    environment = dict(os.environ)
    handlers = {
        number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
    }

    def run(*overrides: str, said: str) -> str:
        config = train.write_config()
        before = sorted(train.home.rglob("*"))
        assert main(["--config", str(config), *overrides]) == 1
        out, err = capsys.readouterr()
        assert out == ""
        assert err.startswith("error: ")
        assert err.count("error: ") == 1
        assert "Traceback" not in err
        assert said in err
        assert sorted(train.home.rglob("*")) == before
        return err

    yield run
    for number, handler in handlers.items():
        signal.signal(number, handler)
    os.environ.clear()
    os.environ.update(environment)


def write_images(folder: Path, count: int, channels: int = 1, classes: int = 2) -> Path:
    """Small PNG files of noise, in class folders."""
    generator = torch.Generator().manual_seed(0)
    for number in range(count):
        path = folder / f"class_{number % classes}" / f"{number:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = torch.randint(256, (28, 28, channels), dtype=torch.uint8, generator=generator).numpy()
        Image.fromarray(pixels.squeeze()).save(path)
    return folder


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["optim.batch=3"], "unknown key optim.batch"),
        (["model.patch_size=32"], "with patches of 32; the nearest sizes that fit are 32 x 32"),
        (["data.image_size=30"], "30 x 30 pixels with patches of 4; the nearest sizes that fit are 32 x 32"),
        (["model.patch_size=14"], "these masks cannot be drawn on a grid of 2 x 2 patches"),
        (["masks.context_tokens=36"], "in sight, at most 10% may: on a grid of 7 x 7 patches"),
        (["masks.context_tokens=37"], "context_tokens must be 1 to 36 on a grid of 7 x 7"),
        (["masks.target_scale=[0.2, 0.1]"], "target_scale must be a range"),
        (["objective.name=mae", "masks.mask_ratio=0.999"], "at least one must be kept and one hidden"),
        (["model.heads=3"], "width / heads must be a multiple of 8, got 32 / 3"),
        (["model.predictor_heads=3"], "16 / 3"),
        (["optim.global_batch=281"], "a global batch of 281 cannot be drawn from 280 images"),
        (["optim.global_batch=15", "speed.accumulation=2"], "15 does not divide into 1 ranks x 2"),
        (["optim.warmup_epochs=40"], "warm-up must fit into the run: 680 of 10 steps"),
        (["optim.steps=null", "optim.epochs=0.01", "optim.warmup_epochs=0"], "less than one optimizer step"),
        (["data.hold_out=10000"], "data.hold_out must leave images to train on"),
        (["data.channels=3", "data.mean=[0, 0, 0]", "data.std=[1, 1, 1]"], "images have 1 channel(s)"),
        (["data.crop_scale=[0.5, 0.2]"], "crop_scale is (0.5, 0.2)"),
        (["speed.cuda_graph=parts"], "speed.cuda_graph parts needs a GPU, and speed.device is cpu"),
        (["speed.cuda_graph=step", "speed.device=auto", "speed.zero_stage=1"], "step needs speed.zero_stage"),
        (["speed.cuda_graph=parts", "masks.mode=packed", "speed.device=auto"], "parts needs masks.mode"),
        (["speed.target_stream=true"], "speed.target_stream needs a GPU: there are no streams on the CPU"),
        (["speed.target_precision=bf16"], "speed.target_precision bf16 needs optim.precision bf16"),
        (["objective.name=mae", "speed.target_precision=fp8"], "objective.name mae has none: leave it out"),
        (["speed.kernels=cuda"], "speed.kernels cuda: no op has that implementation on cpu here; there are"),
        (["data.root=/nowhere/at/all"], "/nowhere/at/all has neither"),
        (["run.init_from=/nowhere/at/all"], "run.init_from /nowhere/at/all: cannot read"),
        (["run.dir=/dev/null/run"], "cannot write to the run folder /dev/null/run: Not a directory"),
    ],
)  # fmt: skip
def test_what_cannot_work_is_refused(refuse: Refuse, overrides: list[str], said: str) -> None:
    refuse(*overrides, said=said)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_cuda_without_a_gpu(refuse: Refuse) -> None:
    refuse("speed.device=cuda", said="torch sees no CUDA device here; use auto or cpu")


def test_folders_of_images(refuse: Refuse, train: "Trainer") -> None:
    folder = train.home / "images"
    settings = ("data.name=folder", "data.hold_out=0")
    refuse(*settings, f"data.root={folder}", said=f"{folder} is not a folder")
    folder.mkdir()
    (folder / "notes.txt").write_text("no images yet")
    refuse(*settings, f"data.root={folder}", said=f"no images below {folder}; looked for .jpg")
    write_images(folder, 20)
    other = write_images(train.home / "other", 6, classes=3)
    refuse(
        *settings, f"data.root={folder}", f"data.probe_root={other}",
        said="other classes than data.root: class_0, class_1, class_2 instead of class_0, class_1",
    )  # fmt: skip


def test_run_folder_of_another_run(refuse: Refuse, train: "Trainer") -> None:
    train.run.mkdir()
    (train.run / "config.yaml").write_text("optim: {lr: 0.5}")
    said = refuse(said=f"{train.run} holds a run with other settings (there -> here):")
    assert "\n  optim.lr: 0.5 -> 0.001\n" in said
    assert "Give this run a folder of its own (run.dir=…)" in said


@pytest.mark.skipif(sys.platform != "linux", reason="needs a read-only mount or a user who is not root")
def test_run_folder_without_permission(refuse: Refuse, train: "Trainer") -> None:
    if os.geteuid() == 0:
        refuse("run.dir=/proc/sys/run", said="cannot write to the run folder /proc/sys/run")
        return
    train.run.mkdir(mode=0o500)
    refuse(said=f"cannot write to the run folder {train.run}: Permission denied")


def test_initial_weights_of_another_architecture(refuse: Refuse, train: "Trainer") -> None:
    from fastjepa.config import load_config
    from fastjepa.engine.build import build_model
    from fastjepa.interop import save_official

    config = load_config(train.write_config(), ["model.predictor_width=32"])
    weights = train.home / "other.pth.tar"
    save_official(build_model(config), weights)
    said = refuse(
        f"run.init_from={weights}", said=f"run.init_from {weights}: the tensors of predictor do not fit"
    )
    assert "and should be" in said
    refuse(
        "objective.name=mae", "model.decoder_width=16", "model.decoder_heads=2", f"run.init_from={weights}",
        said="it has no decoder: was it trained with another objective?",
    )  # fmt: skip


FOLDER = ("data.name=folder", "data.hold_out=10", "optim.warmup_epochs=0", "optim.steps=6")


def test_unreadable_images_are_named_and_skipped(train: "Trainer") -> None:
    folder = write_images(train.home / "images", 60)
    broken = [folder / "class_0" / "004.png", folder / "class_1" / "017.png"]
    broken[0].write_bytes(b"")
    broken[1].write_bytes(broken[1].read_bytes()[:200])
    done = train(*FOLDER, f"data.root={folder}", "speed.workers=2").check()
    for path in broken:
        assert done.out.count(f"warning: skipped {path}: ") == 1
    assert "2 of 50 images could not be read" in done.out
    assert train.saved_steps[-1] == 6


def test_too_many_unreadable_images_stop_the_run(train: "Trainer") -> None:
    folder = write_images(train.home / "images", 60)
    for path in sorted(folder.rglob("*.png"))[::4]:
        path.write_bytes(b"not an image")
    failed = train(*FOLDER, f"data.root={folder}").check(1)
    assert len(failed.errors) == 1
    assert "images cannot be read; at most 5% are skipped" in failed.errors[0]
    assert "not_an_image" not in failed.err
    assert failed.err.count(".png: UnidentifiedImageError") >= 5


def test_diverged_run_names_the_step_the_images_and_the_last_good_checkpoint(train: "Trainer") -> None:
    failed = train("optim.lr=1e30", "optim.warmup_epochs=0", "run.save_every=1", "probe.every_steps=2").check(
        1
    )
    assert len(failed.errors) == 1
    error = failed.errors[0]
    assert "the loss is not finite at step 2, on the images " in error
    assert "the first of 3 bad steps" in error
    assert failed.out.count("the weights stay as they were") == 3
    assert "train-images-idx3-ubyte.gz[" in error
    assert "and 12 more" in error
    found, damaged = newest_good(train.run / "checkpoints")
    assert damaged == []
    assert f"The last good checkpoint is {found}." in error
    assert train.saved_steps == [1]


@pytest.mark.skipif(sys.platform != "linux", reason="limits another process")
def test_full_disk_while_training(train: "Trainer") -> None:
    process = train.start("optim.steps=120")
    train.wait_for(process, step=6)
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (2000, resource.RLIM_INFINITY))
    failed = train.finish(process).check(1)

    assert "warning: checkpoint not written: " in failed.out
    assert "The last good checkpoint is " in failed.out
    assert failed.out.count("training goes on without it") == 1
    assert "step    120/120" in failed.out, "it trained on"
    assert len(failed.errors) == 1
    assert "the last checkpoint could not be written to" in failed.errors[0]
    assert 5 <= train.saved_steps[-1] < 120
    for path in (train.run / "checkpoints").iterdir():
        verify_checkpoint(path)

    # Room again: it goes on from there.
    shutil.rmtree(train.run / "report")
    train("optim.steps=120").check()
    assert train.saved_steps[-1] == 120
    assert [row["step"] for row in train.rows] == [1, *range(5, 125, 5)]
