from pathlib import Path

import pytest
import torch
from PIL import Image

from fastjepa.data.fashion_mnist import FashionMNIST
from fastjepa.data.folder import ImageFolder
from fastjepa.data.labelled import evaluation_batches


def classes(path: Path, each: int = 10) -> ImageFolder:
    for name in ("a", "b", "c"):
        (path / name).mkdir()
        for i in range(each):
            Image.new("L", (12, 8), ord(name) + i).save(path / name / f"{i}.png")
    return ImageFolder(path, channels=1)


def test_every_image_once_with_its_label() -> None:
    data = FashionMNIST(split="test")
    batches = list(evaluation_batches(data, 28, 3000))
    assert [len(labels) for _, labels in batches] == [3000, 3000, 3000, 1000]
    assert torch.equal(torch.cat([pixels for pixels, _ in batches]), data.images)
    assert torch.equal(torch.cat([labels for _, labels in batches]), data.labels)


def test_a_limit_takes_of_every_class(tmp_path: Path) -> None:
    (_, labels), *rest = evaluation_batches(classes(tmp_path), 8, 100, limit=6)
    assert rest == []
    assert labels.tolist() == [0, 0, 1, 1, 2, 2]


def test_a_limit_above_the_set_takes_all(tmp_path: Path) -> None:
    assert sum(len(labels) for _, labels in evaluation_batches(classes(tmp_path), 8, 7, limit=100)) == 30


def test_what_cannot_be_read_is_left_out_not_replaced(tmp_path: Path) -> None:
    images = classes(tmp_path)
    (tmp_path / "a/9.png").write_bytes(b"")
    batches = list(evaluation_batches(images, 8, 10))
    assert [len(labels) for _, labels in batches] == [9, 10, 10]
    pixels = torch.cat([pixels for pixels, _ in batches])[:, 0, 4, 4].tolist()
    assert pixels == [ord(name) + i for name in "abc" for i in range(10) if (name, i) != ("a", 9)]


def test_workers_change_nothing(tmp_path: Path) -> None:
    images = classes(tmp_path)
    alone = list(evaluation_batches(images, 8, 7))
    helped = list(evaluation_batches(images, 8, 7, workers=2))
    for mine, theirs in zip(alone, helped, strict=True):
        assert torch.equal(mine[0], theirs[0])
        assert torch.equal(mine[1], theirs[1])


def test_a_set_without_labels_is_refused_before_the_first_batch(tmp_path: Path) -> None:
    Image.new("L", (8, 8)).save(tmp_path / "a.png")
    with pytest.raises(ValueError, match=r"no labels.*one sub-folder for each class"):
        evaluation_batches(ImageFolder(tmp_path), 8, 4)
