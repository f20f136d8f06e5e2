"""What holds for every draw of multi-block masks; how the draws are distributed is in the files beside."""

from itertools import combinations
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastjepa.masks import Masks, MultiBlockMasks
from fastjepa.masks.blocks import BlockShape
from fastjepa.masks.multiblock import Mode

SIDES = st.integers(4, 15)
MODES: tuple[Mode, ...] = ("truncate", "budget", "packed")
QUICK = settings(deadline=None, max_examples=25)


@st.composite
def samplers(draw: st.DrawFn, modes: tuple[Mode, ...] = MODES) -> MultiBlockMasks:
    """Any sampler whose masks can be drawn."""
    settings: dict[str, Any] = {
        "grid": (draw(SIDES), draw(SIDES)),
        "mode": (mode := draw(st.sampled_from(modes))),
        "seed": draw(st.integers(0, 2**64 - 1)),
        "target_blocks": draw(st.integers(1, 5)),
        "min_keep": draw(st.integers(0, 12)),
        "context_scale": draw(st.sampled_from([(0.85, 1.0), (0.3, 1.0), (0.5, 0.5)])),
    }
    if mode == "budget":  # given, because finding a default takes a thousand draws; that has its own tests
        settings["context_tokens"] = settings["min_keep"] + draw(st.integers(1, 20))
    try:
        return MultiBlockMasks(**settings)
    except ValueError:
        assume(False)
        raise


IMAGES = st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=8)
EPOCHS, STEPS = st.integers(0, 1000), st.integers(0, 10**6)


def contexts_of(masks: Masks) -> list[Tensor]:
    """One list of positions for each image."""
    if masks.cu_seqlens is None:
        return list(masks.context)
    return list(masks.context.split(masks.cu_seqlens.diff().tolist()))


def cells(positions: Tensor, columns: int) -> set[tuple[int, int]]:
    return {divmod(position, columns) for position in positions.tolist()}


def rectangle(top: int, left: int, shape: BlockShape) -> set[tuple[int, int]]:
    return {(row, col) for row in range(top, top + shape.height) for col in range(left, left + shape.width)}


@QUICK
@given(samplers(), IMAGES, EPOCHS, STEPS)
def test_indices_ascend_inside_the_grid(
    sampler: MultiBlockMasks, images: list[int], epoch: int, step: int
) -> None:
    masks = sampler.sample(torch.tensor(images), epoch, step)
    patches = sampler.grid[0] * sampler.grid[1]
    contexts = contexts_of(masks)
    assert len(contexts) == len(images)
    assert masks.targets.shape[:2] == (sampler.target_blocks, len(images))
    assert masks.context.dtype == masks.targets.dtype == torch.int64
    for positions in [*contexts, *masks.targets.flatten(0, 1)]:
        assert 0 <= int(positions[0]) <= int(positions[-1]) < patches
        assert bool((positions.diff() > 0).all()), "ascending, so never repeated"


@QUICK
@given(samplers(), IMAGES, EPOCHS, STEPS)
def test_a_context_has_more_than_min_keep(
    sampler: MultiBlockMasks, images: list[int], epoch: int, step: int
) -> None:
    for context in contexts_of(sampler.sample(torch.tensor(images), epoch, step)):
        assert len(context) > sampler.min_keep


@QUICK
@given(samplers(), st.integers(0, 2**32 - 1), EPOCHS, STEPS)
def test_targets_are_rectangles_of_the_size_of_the_step(
    sampler: MultiBlockMasks, image: int, epoch: int, step: int
) -> None:
    shape, columns = sampler.block_shapes(step)[0], sampler.grid[1]
    for block in sampler.sample(torch.tensor([image]), epoch, step).targets[:, 0]:
        found = cells(block, columns)
        top, left = min(row for row, _ in found), min(column for _, column in found)
        if sampler.mode == "budget":  # a choice of tokens of a block
            height = max(row for row, _ in found) - top + 1
            width = max(column for _, column in found) - left + 1
            assert height <= shape.height
            assert width <= shape.width
        else:
            assert found == rectangle(top, left, shape)


@QUICK
@given(samplers(modes=("truncate", "packed")), st.integers(0, 2**32 - 1), EPOCHS, STEPS)
def test_a_context_is_a_block_without_the_targets_but_for_the_last_let_go_of(
    sampler: MultiBlockMasks, image: int, epoch: int, step: int
) -> None:
    # One image alone is not cut in truncate either.
    masks = sampler.sample(torch.tensor([image]), epoch, step)
    (rows, columns), shape = sampler.grid, sampler.block_shapes(step)[1]
    context = cells(contexts_of(masks)[0], columns)
    targets = [cells(block, columns) for block in masks.targets[:, 0]]
    blocks = [
        rectangle(top, left, shape)
        for top in range(rows - shape.height + 1)
        for left in range(columns - shape.width + 1)
    ]
    kept_out = [set().union(*targets[:count]) for count in range(len(targets) + 1)]
    assert any(context == block - hidden for block in blocks for hidden in kept_out)


@pytest.mark.parametrize("mode", ["truncate", "packed"])
def test_only_targets_that_stand_in_the_way_are_let_go_of(mode: Mode) -> None:
    # A context block of 6 x 6 of 7 x 7 patches, and more than 26 of them to be kept: one or two targets fit.
    sampler = MultiBlockMasks((7, 7), mode, context_scale=(0.85, 0.85), min_keep=26)
    masks = sampler.sample(torch.arange(200))
    overlapped = torch.zeros(4)
    for context, targets in zip(contexts_of(masks), masks.targets.transpose(0, 1), strict=True):
        overlapped += torch.isin(targets, context).any(dim=1)
    assert overlapped[0] == 0
    assert 0 < overlapped[2] < overlapped[3]


@pytest.mark.parametrize("mode", MODES)
def test_what_is_drawn_again_is_of_the_image_too(mode: Mode) -> None:
    # As above, nearly every image takes many tries.
    settings: dict[str, Any] = {"context_tokens": 27} if mode == "budget" else {}
    sampler = MultiBlockMasks((7, 7), mode, context_scale=(0.85, 0.85), min_keep=26, **settings)
    images = torch.arange(100, 132)
    forward, backward = sampler.sample(images), sampler.sample(images.flip(0))
    assert torch.equal(forward.targets, backward.targets.flip(1))
    for one, other in zip(contexts_of(forward), reversed(contexts_of(backward)), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize(("mode", "targets_stay"), [("truncate", True), ("packed", False)])
def test_what_is_drawn_again_is_the_context_alone_as_published_or_the_whole_image(
    mode: Mode, targets_stay: bool
) -> None:
    patient, eager = (
        MultiBlockMasks((7, 7), mode, context_scale=(0.85, 0.85), min_keep=keep) for keep in (26, 0)
    )
    one, other = (sampler.sample(torch.arange(32)) for sampler in (patient, eager))
    assert torch.equal(one.targets, other.targets) is targets_stay
    assert not torch.equal(one.context, other.context)


def test_nothing_is_let_go_of_where_the_grid_is_large() -> None:
    for mode in MODES:
        sampler = MultiBlockMasks((14, 14), mode)
        for step in range(10):
            masks = sampler.sample(torch.arange(64), step=step)
            for context, targets in zip(contexts_of(masks), masks.targets.transpose(0, 1), strict=True):
                assert not torch.isin(targets, context).any()


@QUICK
@given(samplers(modes=("budget",)), IMAGES, st.lists(STEPS, min_size=3, max_size=3))
def test_a_budget_is_constant(sampler: MultiBlockMasks, images: list[int], steps: list[int]) -> None:
    for epoch, step in enumerate(steps):
        masks = sampler.sample(torch.tensor(images), epoch, step)
        assert masks.context.shape == (len(images), sampler.budget_tokens)
        assert masks.targets.shape[2] == sampler.block_tokens
        # Even where every target is let go of, no token comes from outside the context block.
        shape, columns = sampler.block_shapes(step)[1], sampler.grid[1]
        for context in masks.context:
            row, column = context // columns, context % columns
            assert int(row.max() - row.min()) < shape.height
            assert int(column.max() - column.min()) < shape.width


def test_a_default_budget_never_asks_for_more_than_the_smallest_context_block() -> None:
    # 95 % of the draws have more patches than the smallest block (4 x 4), which comes in 2 of 300 steps.
    sampler = MultiBlockMasks(
        (14, 14),
        "budget",
        target_blocks=1,
        context_scale=(0.1, 1.0),
        target_scale=(0.01, 0.011),
        target_aspect=(1.0, 1.0),
        min_keep=3,
    )
    smallest = min(range(300), key=lambda step: sampler.block_shapes(step)[1].area)
    assert sampler.block_shapes(smallest)[1] == BlockShape(4, 4)
    context = cells(sampler.sample(torch.tensor([0]), step=smallest).context[0], columns=14)
    assert {row for row, _ in context} == set(range(min(context)[0], min(context)[0] + 4))


def test_a_default_budget_is_what_95_of_100_draws_reach() -> None:
    budget = MultiBlockMasks((14, 14), "budget").budget_tokens
    assert budget == MultiBlockMasks((14, 14), "budget", seed=7).budget_tokens
    packed = MultiBlockMasks((14, 14), "packed", seed=1)
    steps, images = 400, 16
    draws = [packed.sample(torch.arange(images) + step * images, step=step) for step in range(steps)]
    lengths = torch.tensor([[len(context) for context in contexts_of(masks)] for masks in draws])
    for tokens, low, high in ((budget, 0.94, 1.0), (budget + 2, 0.0, 0.95)):
        reached = (lengths >= tokens).double().mean(dim=1)  # [steps]: sizes are drawn once for a step
        error = float(reached.std()) / steps**0.5
        assert low - 3 * error < float(reached.mean()) < high + 3 * error
        assert error < 0.01


@QUICK
@given(samplers(modes=("packed",)), IMAGES, EPOCHS, STEPS)
def test_cu_seqlens_cut_the_stream(
    sampler: MultiBlockMasks, images: list[int], epoch: int, step: int
) -> None:
    masks = sampler.sample(torch.tensor(images), epoch, step)
    assert masks.cu_seqlens is not None
    assert masks.cu_seqlens.dtype == torch.int32
    assert masks.context.ndim == 1
    assert masks.cu_seqlens[0] == 0
    assert masks.cu_seqlens[-1] == len(masks.context)


@QUICK
@given(samplers(), IMAGES, EPOCHS, STEPS, st.randoms())
def test_an_image_gets_its_masks_in_any_batch(
    sampler: MultiBlockMasks, images: list[int], epoch: int, step: int, random: Any
) -> None:
    masks = sampler.sample(torch.tensor(images), epoch, step)
    place = random.randrange(len(images))
    alone = sampler.sample(torch.tensor([images[place], 1, 2]), epoch, step)
    assert torch.equal(alone.targets[:, 0], masks.targets[:, place])
    one, other = contexts_of(alone)[0], contexts_of(masks)[place]
    # truncate cuts to the shortest of a batch: the same up to the cut.
    cut = min(len(one), len(other)) if sampler.mode == "truncate" else None
    assert torch.equal(one[:cut], other[:cut])


@pytest.mark.parametrize("mode", MODES)
def test_sizes_are_of_the_step_and_places_of_the_image_and_epoch(mode: Mode) -> None:
    sampler = MultiBlockMasks((14, 14), mode)
    images = torch.arange(16)
    sizes = [sampler.block_shapes(step) for step in range(100)]
    assert len(set(sizes)) >= 4
    # Nothing but the sizes depends on the step.
    first, again = next((i, j) for i, j in combinations(range(100), 2) if sizes[i] == sizes[j])
    one, other = sampler.sample(images, 3, first), sampler.sample(images, 3, again)
    assert torch.equal(one.context, other.context)
    assert torch.equal(one.targets, other.targets)
    # Places differ between epochs, images and seeds; sizes only between seeds.
    corners = one.targets[:, :, 0]
    assert not torch.equal(corners, sampler.sample(images, 4, first).targets[:, :, 0])
    assert not torch.equal(corners, sampler.sample(images + 16, 3, first).targets[:, :, 0])
    reseeded = MultiBlockMasks((14, 14), mode, seed=1)
    assert not torch.equal(corners, reseeded.sample(images, 3, first).targets[:, :, 0])
    assert [reseeded.block_shapes(step) for step in range(100)] != sizes


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mode": "truncated"}, "truncate, budget, packed"),
        ({"target_blocks": 0}, "at least one target block"),
        ({"min_keep": -1}, "min_keep must be 0 or more"),
        ({"context_tokens": 40}, "belong to mode 'budget'"),
        ({"mode": "packed", "target_tokens": 0}, "belong to mode 'budget'"),
        ({"mode": "budget", "context_tokens": 0}, "context_tokens must be 1 to 169"),
        ({"mode": "budget", "context_tokens": 170}, "context_tokens must be 1 to 169"),
        ({"mode": "budget", "target_tokens": 25}, "target_tokens must be 1 to 24"),
        ({"grid": (3, 4)}, "3 x 4 patches.*Use a larger image"),
        ({"grid": (1, 40)}, "cannot be drawn"),
        ({"target_scale": (0.001, 0.002)}, "target blocks have 0 patches"),
        ({"target_scale": (0.2, 0.15)}, r"target_scale must be a range .* got \(0.2, 0.15\)"),
        ({"context_scale": (0.5, 1.5)}, "context_scale must be a range .* at most 1"),
        ({"target_aspect": (0.0, 1.0)}, "target_aspect must be a range"),
        ({"min_keep": 169}, "more than min_keep = 169 needed"),
    ],
)
def test_what_cannot_be_drawn_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MultiBlockMasks(**{"grid": (14, 14), **settings})


@pytest.mark.parametrize(
    "image_index", [torch.tensor(3), torch.tensor([], dtype=torch.long), torch.ones(2, 2)]
)
def test_image_indices_are_one_list(image_index: Tensor) -> None:
    with pytest.raises(ValueError, match=r"image_index must be \[B\]"):
        MultiBlockMasks((14, 14)).sample(image_index)
