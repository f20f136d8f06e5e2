"""A subset is a set of its own: renumbered, and read through the whole."""

from pathlib import Path

import torch
from PIL import Image

from fastjepa.data.fashion_mnist import FashionMNIST
from fastjepa.data.folder import ImageFolder
from fastjepa.data.order import GlobalOrder
from fastjepa.data.subset import Subset
from fastjepa.data.views import read_views


def test_in_memory_images_and_labels_are_those_of_the_whole() -> None:
    whole = FashionMNIST(split="test")
    indices = torch.tensor([9999, 3, 500])
    part = Subset(whole, indices)
    assert len(part) == 3
    assert part.images is not None
    assert part.labels is not None
    assert torch.equal(part.images, whole.images[indices])
    assert torch.equal(part.labels, whole.labels[indices])
    assert part.class_names == whole.class_names
    views = read_views(part, [2, 0], 28)
    assert torch.equal(views.pixels, whole.images[[500, 9999]])
    assert views.image_index.tolist() == [2, 0]


def test_files_are_read_and_named_through_the_whole(tmp_path: Path) -> None:
    for shade in range(5):
        (tmp_path / "ab"[shade % 2]).mkdir(exist_ok=True)
        Image.new("L", (8, 8), 50 * shade).save(tmp_path / "ab"[shade % 2] / f"{shade}.png")
    whole = ImageFolder(tmp_path, channels=1)  # a/0 a/2 a/4 b/1 b/3
    part = Subset(whole, torch.tensor([4, 1]))
    assert part.path(0).endswith("b/3.png")
    assert part.labels is not None
    assert part.labels.tolist() == [1, 0]
    pixels = read_views(part, range(2), 8).pixels
    assert pixels.flatten(1)[:, 0].tolist() == [150, 100]
    assert len(GlobalOrder(len(part), 2, seed=0).batch(0)[1]) == 2
