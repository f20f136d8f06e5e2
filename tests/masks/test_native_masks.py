"""The masks that the extension draws are those of the reference, bit for bit, wherever they are drawn."""

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

import fastjepa_kernels as fk
from fastjepa.masks import Masks, MultiBlockMasks
from fastjepa.masks.counter import Stream, random_words
from fastjepa_kernels import native
from fastjepa_kernels.multiblock import multiblock_masks

pytestmark = pytest.mark.skipif(not native.HAS_CPP, reason="fastjepa_kernels._C is not built: make ext")

NUMBERS = st.integers(0, 2**32 - 1)
MODES = ["truncate", "budget", "packed"]


@pytest.fixture
def threads() -> Iterator[Any]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def assert_same(one: Masks, other: Masks) -> None:
    assert torch.equal(one.context, other.context)
    assert torch.equal(one.targets, other.targets)
    assert (one.cu_seqlens is None) == (other.cu_seqlens is None)
    if one.cu_seqlens is not None and other.cu_seqlens is not None:
        assert torch.equal(one.cu_seqlens, other.cu_seqlens)
        assert one.cu_seqlens.dtype == other.cu_seqlens.dtype


def by(implementation: str, sampler: MultiBlockMasks, *args: Any) -> Masks:
    with fk.use(implementation, strict=True):
        return sampler.sample(*args)


@st.composite
def samplers(draw: st.DrawFn) -> MultiBlockMasks:
    """Any sampler, with grids on which a context is often too short, and targets are let go of."""
    context_scale = draw(st.sampled_from([(0.85, 1.0), (0.3, 1.0), (0.85, 0.85)]))
    grid = (draw(st.integers(3, 15)), draw(st.integers(3, 15)))
    settings: dict[str, Any] = {
        "grid": grid,
        "mode": (mode := draw(st.sampled_from(MODES))),
        "seed": draw(st.integers(-(2**64), 2**64)),
        "target_blocks": draw(st.integers(1, 6)),
        "min_keep": draw(st.integers(0, math.prod(grid) // 2)),
        "context_scale": context_scale,
    }
    if mode == "budget":
        settings["context_tokens"] = draw(st.integers(1, math.prod(grid)))
        settings["target_tokens"] = draw(st.none() | st.integers(1, 5))
    try:
        return MultiBlockMasks(**settings)
    except ValueError:
        assume(False)
        raise


@settings(deadline=None, max_examples=60)
@given(samplers(), st.lists(NUMBERS, min_size=1, max_size=9), NUMBERS, st.integers(0, 10**6))
def test_they_are_the_references(sampler: MultiBlockMasks, images: list[int], epoch: int, step: int) -> None:
    index = torch.tensor(images)
    assert_same(by("cpp", sampler, index, epoch, step), by("torch", sampler, index, epoch, step))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("step", [0, 5])
def test_they_are_the_references_where_targets_are_let_go_of(mode: Any, step: int) -> None:
    budget: dict[str, Any] = {"context_tokens": 27} if mode == "budget" else {}
    sampler = MultiBlockMasks((7, 7), mode, context_scale=(0.85, 0.85), min_keep=26, **budget)
    index = torch.arange(300)
    masks = by("cpp", sampler, index, 3, step)
    assert_same(masks, by("torch", sampler, index, 3, step))
    if mode == "packed":
        assert masks.cu_seqlens is not None
        contexts = masks.context.split(masks.cu_seqlens.diff().tolist())
        assert any(torch.isin(masks.targets[:, b], kept).any() for b, kept in enumerate(contexts))


def test_the_default_budget_is_the_references() -> None:
    with fk.use("torch", strict=True):
        expected = MultiBlockMasks((9, 11), "budget").budget_tokens
    with fk.use("cpp", strict=True):
        assert MultiBlockMasks((9, 11), "budget").budget_tokens == expected


@pytest.mark.parametrize("mode", MODES)
def test_neither_threads_nor_strides_nor_types_change_them(mode: Any, threads: Any) -> None:
    sampler = MultiBlockMasks((6, 7), mode, min_keep=4, context_tokens=9 if mode == "budget" else None)
    threads(1)
    expected = by("cpp", sampler, torch.arange(0, 2000, 2))
    threads(2)
    assert_same(by("cpp", sampler, torch.arange(0, 2000, 2)), expected)
    assert_same(by("cpp", sampler, torch.arange(2000)[::2].int()), expected)


@settings(deadline=None, max_examples=30)
@given(
    seed=st.integers(-(2**70), 2**70),
    stream=st.sampled_from(Stream),
    index=st.lists(NUMBERS, max_size=4),
    epoch=NUMBERS,
    count=st.integers(0, 40),
    attempt=st.integers(0, 2**12 - 1),
)
def test_random_words_are_the_references(
    seed: int, stream: Stream, index: list[int], epoch: int, count: int, attempt: int
) -> None:
    numbers = torch.tensor(index, dtype=torch.int64)
    with fk.use("torch", strict=True):
        expected = random_words(seed, stream, numbers, epoch, count, attempt)
    with fk.use("cpp", strict=True):
        found = random_words(seed, stream, numbers, epoch, count, attempt)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("implementation", ["cpp", "torch"])
@pytest.mark.parametrize("image", [-1, 2**32])
def test_numbers_out_of_range_are_refused_by_both(implementation: str, image: int) -> None:
    with pytest.raises(ValueError, match=r"index must lie in 0"):
        by(implementation, MultiBlockMasks((14, 14)), torch.tensor([0, image]))
    with pytest.raises(ValueError, match="epoch must lie in 0"):
        by(implementation, MultiBlockMasks((14, 14)), torch.arange(2), image)


class Sampled(Dataset[Masks]):
    """Item i: the masks of 600 images, enough for two threads, at step i."""

    def __init__(self, sampler: MultiBlockMasks) -> None:
        self.sampler = sampler

    def __len__(self) -> int:
        return 6

    def __getitem__(self, step: int) -> Masks:
        torch.set_num_threads(2)  # more than a worker has a right to
        return self.sampler.sample(torch.arange(600), step=step)


def first(items: list[Masks]) -> Masks:
    return items[0]


@pytest.mark.parametrize("mode", MODES)
def test_workers_of_a_loader_draw_the_same_and_never_hang(mode: Any, threads: Any) -> None:
    sampler = MultiBlockMasks((8, 8), mode, min_keep=4, context_tokens=9 if mode == "budget" else None)
    threads(2)
    expected = [sampler.sample(torch.arange(600), step=step) for step in range(6)]  # starts threads here
    loader = DataLoader(Sampled(sampler), num_workers=2, collate_fn=first, timeout=60)
    for masks, own in zip(loader, expected, strict=True):
        assert_same(masks, own)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image_index": torch.arange(0)}, r"image_index must be int64 \[B\] with B > 0"),
        ({"image_index": torch.ones(2)}, "image_index must be int64"),
        ({"key": (0, -1)}, "key must lie in 0"),
        ({"grid": (0, 9)}, "grid must have"),
        ({"grid": (512, 512)}, "grid must have"),
        ({"target": (6, 10)}, "a block must fit into the grid, got 6 x 10"),
        ({"target": (0, 3)}, "a block must fit into the grid, got 0 x 3"),
        ({"context": (9, 8), "mode": "truncate"}, "a block must fit into the grid, got 9 x 8"),
        ({"target_blocks": 0}, "target_blocks must be 1 to 203"),
        ({"target_blocks": 204}, "target_blocks must be 1 to 203"),
        ({"min_keep": 64}, "the context block has 64 patches, fewer than the 65 needed"),
        ({"min_keep": -1}, "the context block"),
        ({"mode": "budget", "context_tokens": 65, "target_tokens": 1}, "fewer than the 65 needed"),
        ({"mode": "budget", "context_tokens": 5, "target_tokens": 10}, "lie within a block"),
        ({"mode": "budget"}, "must be given for budget alone"),
        ({"context_tokens": 5}, "must be given for budget alone"),
        ({"mode": "packet"}, "mode must be truncate, budget or packed, got packet"),
    ],
)
def test_what_would_leave_the_grid_is_refused(change: dict[str, Any], message: str) -> None:
    given: dict[str, Any] = {
        "image_index": torch.arange(3),
        "key": (1, 2),
        "epoch": 0,
        "grid": (9, 9),
        "target": (3, 3),
        "context": (8, 8),
        "target_blocks": 4,
        "min_keep": 4,
        "mode": "packed",
    }
    context, targets, _ = multiblock_masks(**given)
    assert all(int(positions.max()) < 81 for positions in (context, targets))
    with pytest.raises(ValueError, match=message):
        multiblock_masks(**given | change)


def test_positions_ascend_in_the_packed_stream() -> None:
    masks = MultiBlockMasks((14, 14), "packed").sample(torch.arange(8))
    assert masks.cu_seqlens is not None
    contexts: tuple[Tensor, ...] = masks.context.split(masks.cu_seqlens.diff().tolist())
    assert all(bool((context.diff() > 0).all()) for context in contexts)
