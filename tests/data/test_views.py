from collections.abc import Container
from pathlib import Path

import pytest
import torch
from PIL import Image

from fastjepa.data.fashion_mnist import FashionMNIST
from fastjepa.data.folder import ImageFolder
from fastjepa.data.transforms import Augmentation
from fastjepa.data.unreadable import TooManyUnreadable
from fastjepa.data.views import read_views

CROP = Augmentation(crop_scale=(0.3, 1.0), flip_probability=0.5)


def folder(path: Path, count: int = 60, broken: Container[int] = ()) -> ImageFolder:
    """Images of one grey each, their own number, of several sizes; those in `broken` are empty files."""
    for i in range(count):
        if i in broken:
            (path / f"{i:03}.png").touch()
        else:
            Image.new("L", (20 + i % 7, 20 + i % 5), i).save(path / f"{i:03}.png")
    return ImageFolder(path, channels=1)


def test_in_memory_and_through_pictures_give_the_same_pixels() -> None:
    data = FashionMNIST(split="test")
    pixels, index, unreadable, _ = read_views(data, [5, 3, 5], 28)
    assert torch.equal(pixels, data.images[[5, 3, 5]])
    assert index.tolist() == [5, 3, 5]
    assert unreadable == {}
    flipped = read_views(data, [5, 3, 5], 28, Augmentation(flip_probability=1.0)).pixels
    assert torch.equal(flipped.flip(3), pixels)


@pytest.mark.parametrize("size", [16, 40])
def test_other_sizes(size: int) -> None:
    views = read_views(FashionMNIST(split="test"), [0, 1], size)
    assert views.pixels.shape == (2, 1, size, size)
    assert views.pixels.dtype == torch.uint8


def test_rgb_files(tmp_path: Path) -> None:
    Image.new("RGB", (30, 20), (1, 2, 3)).save(tmp_path / "a.png")
    pixels = read_views(ImageFolder(tmp_path), [0], 8).pixels
    assert pixels.shape == (1, 3, 8, 8)
    assert pixels[0, :, 4, 4].tolist() == [1, 2, 3]


def test_a_view_is_the_same_in_any_batch() -> None:
    data = FashionMNIST(split="test")
    together = read_views(data, [9, 400, 3], 28, CROP, seed=1, epoch=2).pixels
    for row, index in enumerate([9, 400, 3]):
        assert torch.equal(together[row], read_views(data, [index], 28, CROP, seed=1, epoch=2).pixels[0])
    assert not torch.equal(together, read_views(data, [9, 400, 3], 28, CROP, seed=1, epoch=3).pixels)
    assert not torch.equal(together, read_views(data, [9, 400, 3], 28, CROP, seed=2, epoch=2).pixels)


def test_the_next_readable_image_takes_the_place_of_one_that_is_not(tmp_path: Path) -> None:
    images = folder(tmp_path, broken=(7, 8, 59))
    views = read_views(images, [6, 7, 8, 59], 16)
    assert views.image_index.tolist() == [6, 9, 9, 0]
    assert views.pixels[:, 0, 8, 8].tolist() == [6, 9, 9, 0]
    assert sorted(views.unreadable) == [images.path(i) for i in (7, 8, 59)]


def test_a_replacement_looks_as_it_does_in_its_own_place(tmp_path: Path) -> None:
    for i in range(50):
        Image.effect_noise((32, 32), 100).save(tmp_path / f"{i:02}.png")
    (tmp_path / "04.png").write_bytes(b"")
    views = read_views(ImageFolder(tmp_path), [3, 4], 16, CROP, seed=1, epoch=2)
    own = read_views(ImageFolder(tmp_path), [5], 16, CROP, seed=1, epoch=2)
    assert torch.equal(views.pixels[1], own.pixels[0])


@pytest.mark.parametrize(("count", "tried"), [(1, 1), (2, 2), (30, 3), (100, 6)])
def test_a_wholly_bad_folder_stops_at_once(tmp_path: Path, count: int, tried: int) -> None:
    images = folder(tmp_path, count, broken=range(count))
    with pytest.raises(TooManyUnreadable, match=f"{tried} of {tried} images cannot be read"):
        read_views(images, [0], 16)
