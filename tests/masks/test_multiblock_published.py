"""`truncate` draws as the published sampler does (arXiv:2301.08243), which is written here again, plainly.

The two cannot agree draw by draw, so averages are compared. Sizes are drawn once for a batch: batches, not
images, are the sample that errors are computed from.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import numpy as np
import pytest
import torch

from fastjepa.masks import MultiBlockMasks

SIDE, BLOCKS, MIN_KEEP = 14, 4, 10
BATCHES = {1: 800, 64: 120, 128: 80}  # by their size


@dataclass
class Batch:
    """context [B, K] cut to the shortest; targets [M, B, P]."""

    context: np.ndarray
    targets: np.ndarray


def published_batch(random: np.random.Generator, images: int) -> Batch:
    """One batch of the published sampler: sizes for all, places for each, contexts cut to the shortest."""

    def size(scale: tuple[float, float], aspect: tuple[float, float]) -> tuple[int, int]:
        r = random.random()  # the one number gives both scale and aspect
        patches = int(SIDE * SIDE * (scale[0] + r * (scale[1] - scale[0])))
        ratio = aspect[0] + r * (aspect[1] - aspect[0])
        height, width = round((patches * ratio) ** 0.5), round((patches / ratio) ** 0.5)
        return min(height, SIDE - 1), min(width, SIDE - 1)

    def place(height: int, width: int) -> np.ndarray:
        covered = np.zeros((SIDE, SIDE), dtype=bool)
        top, left = random.integers(SIDE - height), random.integers(SIDE - width)  # the end is excluded
        covered[top : top + height, left : left + width] = True
        return covered

    target, context = size((0.15, 0.2), (0.75, 1.5)), size((0.85, 1.0), (1.0, 1.0))
    contexts, blocks = [], []
    for _ in range(images):
        places = [place(*target) for _ in range(BLOCKS)]
        tries = 0
        while True:
            kept_out = np.any(places[: BLOCKS - tries // 20], axis=0) if tries < 20 * BLOCKS else False
            seen = place(*context) & ~kept_out
            tries += 1
            if seen.sum() > MIN_KEEP:
                break
        contexts.append(np.flatnonzero(seen))
        blocks.append([np.flatnonzero(covered) for covered in places])
    shortest = min(map(len, contexts))
    return Batch(np.stack([kept[:shortest] for kept in contexts]), np.array(blocks).swapaxes(0, 1))


@cache
def published(images: int) -> list[Batch]:
    random = np.random.default_rng(0)
    return [published_batch(random, images) for _ in range(BATCHES[images])]


@cache
def ours(images: int) -> list[Batch]:
    sampler = MultiBlockMasks((SIDE, SIDE), "truncate")
    batches = []
    for step in range(BATCHES[images]):
        masks = sampler.sample(torch.arange(images) + step * images, epoch=step, step=step)
        batches.append(Batch(masks.context.numpy(), masks.targets.numpy()))
    return batches


def lengths(batches: list[Batch]) -> list[float]:
    """Of the contexts; nothing cuts those of batches of one image."""
    return [float(batch.context.shape[1]) for batch in batches]


def mean_and_error(values: list[float]) -> tuple[float, float]:
    """Of the mean of independent values: itself and its standard deviation."""
    return float(np.mean(values)), float(np.std(values, ddof=1) / len(values) ** 0.5)


def assert_same_mean(one: list[float], other: list[float]) -> None:
    (first, first_error), (second, second_error) = mean_and_error(one), mean_and_error(other)
    assert abs(first - second) < 5 * (first_error**2 + second_error**2) ** 0.5 + 1e-12, (first, second)


# What the published code gave when it was run: before the cut, after it at B = 64 and 128. Runs differ by .9.
@pytest.mark.parametrize(("images", "measured"), [(1, 81.7), (64, 53.1), (128, 49.9)])
def test_contexts_are_as_long_as_published(images: int, measured: float) -> None:
    mean, error = mean_and_error(lengths(ours(images)))
    assert abs(mean - measured) < 5 * error
    assert error < 1, "too few batches to tell"
    assert_same_mean(lengths(ours(images)), lengths(published(images)))


@pytest.mark.parametrize("draw", [ours, published])
def test_contexts_vary_as_published(draw: Callable[[int], list[Batch]]) -> None:
    # By 13.5 patches; the error of a standard deviation is about itself / sqrt(2 n).
    assert abs(np.std(lengths(draw(1))) - 13.5) < 5 * 13.5 / (2 * BATCHES[1]) ** 0.5


def test_target_blocks_and_their_union_are_as_published() -> None:
    areas = [float(batch.targets.shape[2]) for batch in ours(64)]
    mean, error = mean_and_error(areas)
    assert abs(mean - 33.3) < 5 * error
    assert set(areas) == {float(batch.targets.shape[2]) for batch in published(64)}

    def unions(batches: list[Batch]) -> list[float]:
        return [
            float(np.mean([len(np.unique(batch.targets[:, image])) for image in range(64)]))
            for batch in batches
        ]

    mean, error = mean_and_error(unions(ours(64)))
    assert abs(mean - 87) < 5 * error
    assert_same_mean(unions(ours(64)), unions(published(64)))


def test_the_last_row_and_column_are_never_used() -> None:
    for batch in ours(64) + published(64):
        for positions in (batch.context, batch.targets):
            row, column = np.divmod(positions, SIDE)
            assert row.max() < SIDE - 1
            assert column.max() < SIDE - 1


@pytest.mark.parametrize(("images", "measured"), [(64, 0.59), (128, 0.62)])
def test_the_cut_keeps_the_top_of_the_image_as_published(images: int, measured: float) -> None:
    def share_of_top(batches: list[Batch]) -> list[float]:
        return [float((batch.context < 4 * SIDE).mean()) for batch in batches]

    mean, error = mean_and_error(share_of_top(ours(images)))
    assert abs(mean - measured) < 5 * error + 0.005, "the measured share is given to two digits"
    assert_same_mean(share_of_top(ours(images)), share_of_top(published(images)))


@pytest.mark.parametrize("what", ["context", "targets"])
def test_every_row_and_column_is_used_as_often_as_published(what: str) -> None:
    def shares(batches: list[Batch], line: int, along_rows: bool) -> list[float]:
        positions = [getattr(batch, what) for batch in batches]
        return [float(((p // SIDE if along_rows else p % SIDE) == line).mean()) for p in positions]

    for line in range(SIDE):
        for along_rows in (True, False):
            assert_same_mean(shares(ours(64), line, along_rows), shares(published(64), line, along_rows))
