import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from fastjepa.data.transforms import (
    UNCHANGED,
    Augmentation,
    Box,
    Chance,
    augment,
    center_box,
    corners_of,
    crop_box,
    draw,
    view,
)

SIDES = st.integers(1, 3000)
CROP = Augmentation(crop_scale=(0.3, 1.0), flip_probability=0.5)


def noise(height: int, width: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def inside(box: Box, height: int, width: int) -> bool:
    return (
        box.height >= 1
        and box.width >= 1
        and 0 <= box.top <= height - box.height
        and 0 <= box.left <= width - box.width
    )


@settings(deadline=None)
@given(SIDES, SIDES, st.integers(0, 2**64 - 1), st.floats(0.01, 1.0), st.floats(0.3, 3.0))
def test_a_crop_lies_in_the_image(height: int, width: int, seed: int, low: float, ratio: float) -> None:
    ratios = (min(ratio, 1.2), max(ratio, 1.2))
    chance = draw(Augmentation(crop_scale=(low, 1.0), crop_ratio=ratios), seed, 0, torch.tensor([5]))[0]
    assert inside(crop_box(height, width, (low, 1.0), ratios, chance.crop), height, width)


@settings(deadline=None)
@given(SIDES, SIDES)
def test_the_central_box_is_the_largest_square(height: int, width: int) -> None:
    box = center_box(height, width)
    assert inside(box, height, width)
    assert box.height == box.width == min(height, width)
    assert abs(2 * box.top + box.height - height) <= 1
    assert abs(2 * box.left + box.width - width) <= 1


@pytest.mark.parametrize(("height", "width"), [(375, 500), (500, 333), (224, 224), (100, 400)])
@pytest.mark.parametrize("scale", [(0.3, 1.0), (0.08, 1.0)])
def test_crops_are_distributed_as_in_torchvision(height: int, width: int, scale: tuple[float, float]) -> None:
    RandomResizedCrop = pytest.importorskip("torchvision.transforms").RandomResizedCrop
    draws, ratio = 3000, (3 / 4, 4 / 3)
    chances = draw(Augmentation(crop_scale=scale, crop_ratio=ratio), 0, 0, torch.arange(draws))
    ours = np.array([crop_box(height, width, scale, ratio, chance.crop) for chance in chances], dtype=float)
    torch.manual_seed(0)
    image = torch.zeros(1, height, width)
    theirs = np.array(
        [RandomResizedCrop.get_params(image, list(scale), list(ratio)) for _ in range(draws)], dtype=float
    )
    # Top, left, height, width, area, log ratio, and their squares: means within 4 standard errors.
    ours, theirs = (
        np.column_stack([x, x[:, 2] * x[:, 3] / height, np.log(x[:, 3] / x[:, 2])]) for x in (ours, theirs)
    )
    ours, theirs = np.hstack([ours, ours**2]), np.hstack([theirs, theirs**2])
    error = np.sqrt((ours.var(0) + theirs.var(0)) / draws)
    assert (np.abs(ours.mean(0) - theirs.mean(0)) <= 4 * error + 1e-9).all()


def test_an_image_too_narrow_for_any_crop_gives_its_middle() -> None:
    numbers = [0.5] * 22
    assert crop_box(10, 1000, (0.9, 1.0), (3 / 4, 4 / 3), numbers) == Box(0, 493, 10, 13)
    assert crop_box(1000, 9, (0.9, 1.0), (3 / 4, 4 / 3), numbers) == Box(494, 0, 12, 9)
    assert crop_box(50, 1, (0.9, 1.0), (3.0, 4.0), numbers) == Box(24, 0, 1, 1)


def test_a_draw_depends_on_the_image_alone_not_on_its_batch() -> None:
    index = torch.tensor([4, 9_999_999, 17])
    together = draw(CROP, 3, 7, index)
    assert together == [draw(CROP, 3, 7, index[i : i + 1])[0] for i in range(3)]
    assert together != draw(CROP, 3, 8, index)
    assert together != draw(CROP, 4, 7, index)


@pytest.mark.parametrize("probability", [0.0, 0.3, 1.0])
def test_flips_come_as_often_as_asked(probability: float) -> None:
    chances = draw(Augmentation(flip_probability=probability), 0, 0, torch.arange(4000))
    rate = sum(chance.flip for chance in chances) / 4000
    assert abs(rate - probability) <= 4 * math.sqrt(probability * (1 - probability) / 4000)


def test_a_view_of_the_whole_at_its_own_size_is_the_image() -> None:
    image = noise(20, 20)
    pixels = augment(image, 20, UNCHANGED, Chance([], flip=False))
    assert pixels.dtype == torch.uint8
    assert torch.equal(pixels, torch.from_numpy(np.array(image)).permute(2, 0, 1))


def test_a_view_shows_its_box_and_mirrors_it() -> None:
    image = Image.new("L", (40, 20))
    image.paste(200, (10, 5, 20, 15))
    box = Box(top=5, left=10, height=10, width=10)
    assert view(image, corners_of(box), 5, flip=False).shape == (1, 5, 5)
    assert int(view(image, corners_of(box), 5, flip=False)[0, 2, 2]) == 200
    half = Box(top=5, left=15, height=10, width=10)  # its left half is bright
    plain, mirrored = (
        view(image, corners_of(half), 4, flip=False),
        view(image, corners_of(half), 4, flip=True),
    )
    assert plain[0, 2, 0] > 150
    assert plain[0, 2, 3] < 50
    assert torch.equal(mirrored, plain.flip(2))


def test_a_small_image_is_enlarged() -> None:
    assert augment(noise(3, 5), 32, UNCHANGED, draw(UNCHANGED, 0, 0, torch.tensor([0]))[0]).shape == (
        3,
        32,
        32,
    )


@settings(deadline=None)
@given(st.integers(1, 10_000))
def test_crops_are_reproduced_from_seed_epoch_and_image(image_index: int) -> None:
    image = noise(30, 40, seed=1)
    chance = draw(CROP, 5, 2, torch.tensor([image_index]))[0]
    first = augment(image, 8, CROP, chance)
    assert torch.equal(first, augment(image, 8, CROP, draw(CROP, 5, 2, torch.tensor([image_index]))[0]))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"crop_scale": (0.0, 1.0)}, "crop_scale is"),
        ({"crop_scale": (0.5, 0.3)}, "crop_scale is"),
        ({"crop_scale": (0.5, 1.1)}, "crop_scale is"),
        ({"crop_ratio": (2.0, 1.0)}, "crop_ratio is"),
        ({"flip_probability": 1.5}, "flip_probability is"),
    ],
)
def test_impossible_augmentations_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Augmentation(**arguments)
