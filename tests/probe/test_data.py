import os
import shutil
from pathlib import Path

import pytest
import torch

from fastjepa.data.packing.encode import Packing
from fastjepa.data.packing.pack import pack
from fastjepa.probe.data import open_probe_images
from fastjepa.probe.subjects import ProbeError
from tests.probe.conftest import NAMES


def test_one_folder_is_divided_class_by_class(folder: Path) -> None:
    images = open_probe_images([str(folder)], None, 1, seed=0)
    assert (len(images.train), len(images.test)) == (50, 10)
    assert images.train.labels is not None
    assert images.test.labels is not None
    assert torch.bincount(images.train.labels).tolist() == [10] * 5
    assert torch.bincount(images.test.labels).tolist() == [2] * 5
    paths = [[part.path(i) for i in range(len(part))] for part in (images.train, images.test)]
    assert not set(paths[0]) & set(paths[1])
    again = open_probe_images([str(folder)], None, 1, seed=0)
    assert again.fingerprint == images.fingerprint
    assert open_probe_images([str(folder)], None, 1, seed=1).fingerprint != images.fingerprint


def test_train_and_val_inside_of_one_are_two(folder: Path, tmp_path: Path) -> None:
    for part in ("train", "val"):
        shutil.copytree(folder, tmp_path / part)
    inside = open_probe_images([str(tmp_path)], None, 1, seed=0)
    named = open_probe_images([str(tmp_path / "train"), str(tmp_path / "val")], None, 1, seed=5)
    assert inside.fingerprint == named.fingerprint
    assert len(inside.test) == 60
    assert list(inside.test.class_names or ()) == list(NAMES)


def test_a_folder_that_moved_is_the_same_and_one_that_changed_is_not(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "moved")
    here, there = (open_probe_images([str(f)], None, 1, seed=0) for f in (folder, tmp_path / "moved"))
    assert here.fingerprint == there.fingerprint
    next((tmp_path / "moved" / "bag").glob("*.png")).unlink()
    assert open_probe_images([str(tmp_path / "moved")], None, 1, seed=0).fingerprint != here.fingerprint


def test_limits_are_spread_over_the_classes() -> None:
    images = open_probe_images(["fashion_mnist"], None, 1, 0, train_images=100, test_images=50)
    assert (len(images.train), len(images.test)) == (100, 50)
    assert "100 to learn from, 50 tested" in images.note


def test_what_is_refused_says_what_to_do(folder: Path, tmp_path: Path) -> None:
    one_class, single, other = tmp_path / "one", tmp_path / "single", tmp_path / "other"
    shutil.copytree(folder / "bag", one_class / "bag")
    shutil.copytree(folder, single)
    for image in sorted((single / "coat").iterdir())[1:]:
        image.unlink()
    shutil.copytree(folder, other)
    (other / "coat").rename(other / "cloak")
    for folders, limit, said in (
        ([one_class], None, "it holds one sub-folder, bag. Every image must lie in one of at least two"),
        ([folder / "bag"], None, "it holds 0 sub-folders"),
        ([tmp_path / "nowhere"], None, "is not a folder"),
        ([single], None, "has one image of coat, and a class needs two"),
        ([folder, other], None, "have other classes; in one of them only: cloak, coat"),
        ([folder, folder], None, "is given to learn from and to be tested on"),
        ([folder] * 3, None, "--data has 3 folders: give one, or two"),
        ([folder], 3, "3 images to learn from hold 3 of 5 classes: give more images"),
        ([], None, "a file does not say which images to use: give --data FOLDER"),
    ):
        with pytest.raises(ProbeError, match=said.replace(".", r"\.")):
            open_probe_images([str(f) for f in folders], None, 1, 0, train_images=limit)


def test_shards_are_images_as_their_folder_is(folder: Path, tmp_path: Path) -> None:
    pack(folder, tmp_path / "packed", Packing())
    images = open_probe_images([str(tmp_path / "packed")], None, 1, seed=0)
    assert (len(images.train), len(images.test)) == (50, 10)
    assert list(images.test.class_names or ()) == list(NAMES)
    again = open_probe_images([str(tmp_path / "packed")], None, 1, seed=0)
    assert again.fingerprint == images.fingerprint
    assert open_probe_images([str(tmp_path / "packed")], None, 1, seed=1).fingerprint != images.fingerprint


def test_odd_names_and_files_that_are_gone_are_fingerprinted(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "odd")
    before = open_probe_images([str(tmp_path / "odd")], None, 1, seed=0).fingerprint
    (tmp_path / "odd" / "bag" / os.fsdecode(b"gone\xff.png")).symlink_to("nowhere.png")
    assert open_probe_images([str(tmp_path / "odd")], None, 1, seed=0).fingerprint != before
