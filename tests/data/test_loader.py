import itertools
import pickle
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from fastjepa.data.fashion_mnist import FashionMNIST
from fastjepa.data.folder import ImageFolder
from fastjepa.data.loader import Batch, make_loader
from fastjepa.data.order import GlobalOrder
from fastjepa.data.transforms import Augmentation
from fastjepa.data.unreadable import TooManyUnreadable
from fastjepa.data.views import Reading
from fastjepa.masks import MultiBlockMasks, RandomMasks

CROP = Augmentation(crop_scale=(0.3, 1.0), flip_probability=0.5)
MASKS = RandomMasks(grid=(4, 4), seed=3)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> ImageFolder:
    """Forty-eight images of noise, one of them broken."""
    path = tmp_path_factory.mktemp("images")
    for i in range(48):
        Image.effect_noise((24 + i % 5, 20 + i % 7), 120).save(path / f"{i:02}.png")
    (path / "17.png").write_bytes(b"broken")
    return ImageFolder(path, channels=1)


def load(images: ImageFolder, *, global_batch: int = 16, **arguments: Any) -> list[Batch]:
    order = GlobalOrder(len(images), global_batch, seed=1)
    return list(make_loader(images, MASKS, order, size=16, augmentation=CROP, seed=5, **arguments))


def assert_same(left: list[Batch], right: list[Batch]) -> None:
    assert len(left) == len(right)
    for a, b in zip(left, right, strict=True):
        assert (a.step, a.epoch, a.unreadable) == (b.step, b.epoch, b.unreadable)
        assert torch.equal(a.image_index, b.image_index)
        assert torch.equal(a.images, b.images)
        assert torch.equal(a.masks.context, b.masks.context)
        assert torch.equal(a.masks.targets, b.masks.targets)


def by_image(batches: list[Batch]) -> dict[tuple[int, int], tuple[Any, ...]]:
    """(step, image) -> everything the step sees of it."""
    return {
        (batch.step, int(index)): (batch.images[row].tolist(), batch.masks.context[row].tolist())
        for batch in batches
        for row, index in enumerate(batch.image_index)
    }


def test_a_batch_holds_what_it_says() -> None:
    data = FashionMNIST(split="test")
    order = GlobalOrder(len(data), 64, seed=0)
    masks = MultiBlockMasks(grid=(7, 7), mode="truncate", seed=0)
    loader = make_loader(data, masks, order, size=28, augmentation=Augmentation(), seed=0, first_step=156)
    batch = next(loader)
    epoch, indices = order.batch(156)
    assert (batch.step, batch.epoch, epoch) == (156, 1, 1)
    assert torch.equal(batch.image_index, indices)
    assert torch.equal(batch.images, data.images[indices])
    expected = masks.sample(indices, epoch=1, step=156)
    assert torch.equal(batch.masks.context, expected.context)
    assert torch.equal(batch.masks.targets, expected.targets)
    assert batch.unreadable == {}


def test_workers_change_nothing(images: ImageFolder) -> None:
    assert_same(load(images, last_step=5, workers=2), load(images, last_step=5))


def test_a_run_resumes_in_the_middle_of_an_epoch(images: ImageFolder) -> None:
    straight = load(images, last_step=8, accumulation=2)
    assert [batch.epoch for batch in straight] == [0] * 6 + [1] * 6 + [2] * 4
    assert_same(load(images, first_step=4, last_step=8, accumulation=2), straight[8:])


@pytest.mark.parametrize(("world_size", "accumulation"), [(2, 1), (1, 4), (2, 2)])
def test_ranks_and_accumulation_share_out_the_images(
    images: ImageFolder, world_size: int, accumulation: int
) -> None:
    parts = [
        load(images, last_step=4, rank=rank, world_size=world_size, accumulation=accumulation)
        for rank in range(world_size)
    ]
    assert all(len(part) == 4 * accumulation for part in parts)
    assert all(len(batch.images) == 16 // world_size // accumulation for part in parts for batch in part)
    assert by_image(list(itertools.chain(*parts))) == by_image(load(images, last_step=4))


def test_an_unreadable_image_is_replaced_and_named(images: ImageFolder) -> None:
    batches = load(images, last_step=3)
    assert sorted(torch.cat([batch.image_index for batch in batches]).tolist()) == sorted(
        [*range(17), 18, *range(18, 48)]
    )
    named = [path for batch in batches for path in batch.unreadable]
    assert named == [images.path(17)]


@pytest.mark.parametrize("workers", [0, 2])
def test_too_many_unreadable_images_stop_the_run(tmp_path: Path, workers: int) -> None:
    for i in range(40):
        Image.new("L", (8, 8)).save(tmp_path / f"{i:02}.png")
        if i % 8 == 0:
            (tmp_path / f"{i:02}.png").write_bytes(b"")
    with pytest.raises(TooManyUnreadable, match=r"of \d+ images cannot be read(.|\n)*\d\d\.png"):
        load(ImageFolder(tmp_path, channels=1), last_step=100, global_batch=8, workers=workers)


def test_it_goes_on_across_epochs_until_told_to_stop(images: ImageFolder) -> None:
    order = GlobalOrder(len(images), 16, seed=0)
    loader = make_loader(images, MASKS, order, size=16, augmentation=CROP, seed=0)
    assert [batch.epoch for batch in itertools.islice(loader, 10)] == [0, 0, 0, 1, 1, 1, 2, 2, 2, 3]


def test_what_does_not_fit_together_is_refused_at_once(images: ImageFolder) -> None:
    order = GlobalOrder(48, 16, seed=0)
    settings: dict[str, Any] = {"size": 16, "augmentation": CROP, "seed": 0}
    with pytest.raises(ValueError, match="the order is of 47 images, the set has 48"):
        make_loader(images, MASKS, GlobalOrder(47, 16, seed=0), **settings)
    with pytest.raises(ValueError, match=r"16 does not divide into 3 ranks .* 15 or 18"):
        make_loader(images, MASKS, order, world_size=3, **settings)
    with pytest.raises(ValueError, match="rank 2 of 2; ranks are 0 to 1"):
        make_loader(images, MASKS, order, rank=2, world_size=2, **settings)


def test_pixels_and_masks_move_to_a_device_and_image_numbers_stay(images: ImageFolder) -> None:
    batch = load(images, last_step=1)[0].to("meta")
    tensors = [batch.images, batch.masks.context, batch.masks.targets]
    assert all(tensor.device.type == "meta" for tensor in tensors)
    assert batch.image_index.device.type == "cpu"
    assert (batch.step, batch.epoch) == (0, 0)


def test_a_batch_survives_a_trip_between_processes(images: ImageFolder) -> None:
    batch = load(images, last_step=1)[0]
    copy = pickle.loads(pickle.dumps(batch))
    assert {field.name for field in fields(copy)} == {field.name for field in fields(Batch)}
    assert_same([batch], [copy])


@pytest.mark.parametrize("workers", [0, 1])
def test_crops_resized_on_the_device_are_the_same_batch(images: ImageFolder, workers: int) -> None:
    here = load(images, last_step=2)
    there = load(images, last_step=2, workers=workers, reading=Reading(augment="device"))
    for ours, theirs in zip(there, here, strict=True):
        assert ours.resampling is not None
        moved = ours.to("cpu")
        assert moved.resampling is None
        assert (moved.images.int() - theirs.images.int()).abs().max() <= 1
        assert torch.equal(moved.image_index, theirs.image_index)
        assert torch.equal(moved.masks.context, theirs.masks.context)
