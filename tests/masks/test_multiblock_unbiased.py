"""`budget` and `packed` have none of the published biases: every side and corner of an image counts alike."""

from functools import cache

import pytest
import torch
from torch import Tensor

from fastjepa.masks import Masks, MultiBlockMasks
from fastjepa.masks.multiblock import Mode
from fastjepa.masks.random_masks import choose

ROWS, COLUMNS = 10, 12
IMAGES, STEPS = 64, 60


def seen_by_image(masks: Masks, images: int, patches: int) -> Tensor:
    """bool [images, patches]: what is context."""
    seen = torch.zeros(images, patches, dtype=torch.bool)
    if masks.cu_seqlens is None:
        return seen.scatter(1, masks.context, True)
    seen[torch.arange(images).repeat_interleave(masks.cu_seqlens.diff().long()), masks.context] = True
    return seen


@cache
def used(mode: Mode) -> dict[str, Tensor]:
    """How often each image saw or predicted a patch: [images, rows, columns] of context and of targets."""
    sampler = MultiBlockMasks((ROWS, COLUMNS), mode)
    context, targets = (torch.zeros(STEPS * IMAGES, ROWS * COLUMNS) for _ in range(2))
    for step in range(STEPS):
        images = torch.arange(step * IMAGES, (step + 1) * IMAGES)
        masks = sampler.sample(images, step=step)
        context[images] = seen_by_image(masks, IMAGES, ROWS * COLUMNS).float()
        blocks = masks.targets.transpose(0, 1).flatten(1)  # [B, M P]
        targets[images] = targets[images].scatter_add(1, blocks, torch.ones(blocks.shape))
    return {name: seen.view(-1, ROWS, COLUMNS) for name, seen in (("context", context), ("targets", targets))}


@pytest.mark.parametrize("mode", ["budget", "packed"])
@pytest.mark.parametrize("what", ["context", "targets"])
def test_every_patch_is_used(mode: Mode, what: str) -> None:
    assert used(mode)[what].sum(dim=0).min() > 0


@pytest.mark.parametrize("mode", ["budget", "packed"])
@pytest.mark.parametrize("what", ["context", "targets"])
@pytest.mark.parametrize("axis", [1, 2])
def test_left_is_as_right_and_top_as_bottom(mode: Mode, what: str, axis: int) -> None:
    seen = used(mode)[what].sum(dim=3 - axis)  # [images, side]
    difference = seen - seen.flip(1)
    # Images are drawn independently of each other once the sizes are fixed, and symmetric for any sizes.
    error = difference.std(dim=0) / len(seen) ** 0.5
    assert bool((difference.mean(dim=0).abs() < 5 * error).all())


def test_a_choice_is_unbiased_ascending_and_of_what_is_allowed() -> None:
    allowed = torch.rand(40, generator=torch.Generator().manual_seed(0)) < 0.5
    words = torch.randint(2**32, (8000, 40), generator=torch.Generator().manual_seed(1))
    chosen = choose(words, allowed.expand(8000, -1), 5)
    assert bool((chosen.diff(dim=1) > 0).all())
    counts = chosen.flatten().bincount(minlength=40).double()
    assert bool((counts[~allowed] == 0).all())
    share = 5 / int(allowed.sum())
    deviation = (8000 * share * (1 - share)) ** 0.5
    assert bool(((counts[allowed] - 8000 * share).abs() < 5 * deviation).all())


def test_a_budget_keeps_each_token_of_a_context_and_of_a_block_as_often() -> None:
    images = torch.arange(2000)
    budget = MultiBlockMasks((14, 14), "budget").sample(images)
    packed = MultiBlockMasks((14, 14), "packed").sample(images)
    blocks, _, area = packed.targets.shape
    tokens = budget.targets.shape[2]
    assert tokens < area

    # The blocks are the same, unless an image was drawn again because its context was below the budget.
    place = torch.searchsorted(packed.targets, budget.targets).clamp(max=area - 1)  # [M, B, P]
    same = (packed.targets.gather(2, place) == budget.targets).all(dim=2).all(dim=0)  # [B]
    count = int(same.sum())
    assert count > 0.9 * len(images)
    kept = place[:, same].flatten().bincount(minlength=area).double()
    expected, share = blocks * count * tokens / area, tokens / area
    assert bool(((kept - expected).abs() < 5 * (expected * (1 - share)) ** 0.5).all())

    whole, chosen = (seen_by_image(masks, len(images), 14 * 14)[same] for masks in (packed, budget))
    assert not (chosen & ~whole).any()
    length = whole.sum(dim=1, keepdim=True)
    rank = whole.cumsum(dim=1) - 1
    share_kept = budget.context.shape[1] / length.double().squeeze(1)
    for asked in (torch.zeros_like(length), length // 4, length // 2, length - 1):
        is_kept = (chosen & whole & (rank == asked)).any(dim=1).double()
        error = (share_kept * (1 - share_kept)).sum() ** 0.5
        assert abs(float((is_kept - share_kept).sum())) < 5 * float(error)
