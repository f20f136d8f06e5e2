"""Training on shards: packed, indexed, and the same images whatever reads them."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from fastjepa.config import load_config
from fastjepa.data.folder import ImageFolder
from fastjepa.data.order import GlobalOrder
from fastjepa.data.packing.encode import Packing
from fastjepa.data.packing.pack import pack
from fastjepa.engine.images import open_images
from fastjepa.train import main
from tests.data.pictures import write_photos
from tests.data.ranges import served
from tests.faults.evidence import Seen, Watched, Witness

if TYPE_CHECKING:
    from tests.conftest import Trainer

STEPS, BATCH = 8, 16
RUN = (
    "data.name=shards",
    "data.channels=3",
    "data.mean=[0.5, 0.5, 0.5]",
    "data.std=[0.25, 0.25, 0.25]",
    "data.hold_out=10",
    "data.shuffle_shards=2",
    f"optim.global_batch={BATCH}",
    f"optim.steps={STEPS}",
)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """100 photographs in several shards."""
    home = tmp_path_factory.mktemp("shards")
    write_photos(home / "images", 100)
    report = pack(home / "images", home / "packed", Packing(short_side=32, shard_bytes=40_000))
    assert report.packed == 100
    assert report.shards >= 5
    return home / "packed"


@pytest.mark.slow
def test_the_same_images_whatever_reads_them(
    shards: Path, trainer_at: "Callable[[Path], Trainer]", tmp_path: Path
) -> None:
    def watched(name: str) -> Watched:
        (tmp_path / name).mkdir()
        return Watched(trainer_at(tmp_path / name), Witness(tmp_path / name / "witness"))

    def trained_on(run: Watched) -> dict[int, list[Seen]]:
        return {step: sorted(seen) for step, seen in run.witness.trained_on().items()}

    alone, workers = watched("alone"), watched("workers")
    alone(*RUN, f"data.root={shards}", "speed.workers=0").check()
    workers(*RUN, f"data.root={shards}", "speed.workers=2").check()
    whole = trained_on(alone)
    assert {step: len(seen) for step, seen in whole.items()} == dict.fromkeys(range(STEPS), BATCH)
    assert trained_on(workers) == whole

    # Taken up again at step 5, in the middle of its epochs, from a server.
    shutil.rmtree(workers.checkpoints / f"step_{STEPS:08d}")
    with served(shards) as (url, ranges):
        workers(*RUN, f"data.root={url}", "speed.workers=2").check()
        assert len(ranges) >= (STEPS - 5) * BATCH
    assert workers.witness.newest_step() == STEPS - 1
    assert trained_on(workers) == whole

    # In the order that is said: two shards at a time.
    images = open_images(load_config(alone.trainer.home / "tiny.yaml", [*RUN, f"data.root={shards}"]))
    assert images.shard_ends[-1] == len(images.train) == 90
    order = GlobalOrder(90, BATCH, 0, shard_ends=images.shard_ends, shuffle_shards=2)
    assert [sorted(seen.image for seen in whole[step]) for step in range(STEPS)] == [
        sorted(order.batch(step)[1].tolist()) for step in range(STEPS)
    ]


def test_shards_that_cannot_be_used_are_refused_before_anything_is_written(
    shards: Path, train: "Trainer", tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = str(train.write_config())
    for settings, said in (
        ([], "data.name shards needs data.root"),
        ([f"data.root={tmp_path / 'nowhere'}"], "must be a folder of indexed shards"),
        ([f"data.root={tmp_path}"], "holds no shards (*.tar)"),
        ([f"data.root={shards}", "data.probe_root=/nowhere", "data.hold_out=0"], "there is no /nowhere"),
        ([f"data.root={shards}", "data.max_bad_fraction=2"], "data.max_bad_fraction must be from 0 to 1"),
    ):
        assert main(["--config", config, *RUN, *settings]) == 1
        assert said in capsys.readouterr().err
    assert not train.run.exists()


def test_parts_of_a_data_set_are_refused_as_classes(
    train: "Trainer", tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for part in ("train", "val"):
        write_photos(tmp_path / "images" / part, 10)
    settings = [*RUN, "data.name=folder", f"data.root={tmp_path / 'images'}"]
    assert main(["--config", str(train.write_config()), *settings]) == 1
    assert f"give one of them, such as {tmp_path / 'images' / 'train'}" in capsys.readouterr().err
    assert ImageFolder(tmp_path / "images" / "train").class_names == ("class_0", "class_1")


def test_the_share_of_bad_images_that_is_tolerated_is_a_setting(train: "Trainer", tmp_path: Path) -> None:
    images = write_photos(tmp_path / "images", 40)
    for path in sorted(images.rglob("*.jpg"))[::8]:
        path.write_bytes(path.read_bytes()[:100])
    settings = (*RUN, "data.name=folder", "data.hold_out=0", f"data.root={images}")
    done = train(*settings, "data.max_bad_fraction=0.5").check()
    assert "5 of 40 images could not be read and were skipped" in done.out
    assert json.loads((train.run / "metrics.jsonl").read_text().splitlines()[-1])["step"] == STEPS
