"""What a reader of the documentation has, for the commands in it."""

import shutil
from pathlib import Path

import pytest

from fastjepa import cli
from fastjepa import train as trainer
from fastjepa.interop import save_official
from fastjepa.interop.start import load_trained
from tests.conftest import ROOT
from tests.data.pictures import jpeg, write_photos, write_shard
from tests.docs.rules import ADDED, SMALL_RUN


@pytest.fixture(scope="session")
def readers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a reader has: the checkout, images, and a run."""
    folder = tmp_path_factory.mktemp("reader")
    for name in ("configs", "fastjepa", "scripts"):
        (folder / name).symlink_to(ROOT / name)
    images = write_photos(folder / "images", 40)
    photos = {f"{n}.jpg": jpeg(seed=n) for n in range(8)} | {f"{n}.cls": b"0" for n in range(8)}
    write_shard(folder / "shards.tar", photos)
    run = folder / "runs" / "NAME"
    config = ["--config", str(ROOT / "configs/vit_tiny_16.yaml"), f"data.root={images}", *SMALL_RUN]
    assert trainer.main([*config, f"run.dir={run}"]) == 0
    assert cli.main(["probe", str(run), *ADDED["probe"]]) == 0
    for name in ("A", "B"):
        shutil.copytree(run, run.with_name(name))
    save_official(load_trained(run)[0], folder / "published.pth.tar")
    return folder


@pytest.fixture
def here(readers: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it, as the current folder."""
    folder = tmp_path / "reader"
    shutil.copytree(readers, folder, symlinks=True)
    (folder / "shards").mkdir()
    (folder / "shards.tar").rename(folder / "shards" / "0.tar")
    monkeypatch.chdir(folder)
    return folder
