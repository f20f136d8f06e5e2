import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastjepa.masks import RandomMasks


@settings(deadline=None, max_examples=30)
@given(
    st.tuples(st.integers(1, 16), st.integers(1, 16)),
    st.floats(0, 1),
    st.integers(0, 2**64),
    st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=8),
    st.integers(0, 1000),
)
def test_context_and_target_share_the_grid_out(
    grid: tuple[int, int], mask_ratio: float, seed: int, images: list[int], epoch: int
) -> None:
    patches = grid[0] * grid[1]
    kept = int(patches * (1 - mask_ratio))
    if not 0 < kept < patches:
        with pytest.raises(ValueError, match="at least one must be kept and one hidden"):
            RandomMasks(grid, mask_ratio, seed)
        return
    sampler = RandomMasks(grid, mask_ratio, seed)
    masks = sampler.sample(torch.tensor(images), epoch)
    assert masks.context.shape == (len(images), kept)
    assert masks.targets.shape == (1, len(images), patches - kept)
    assert masks.cu_seqlens is None
    for context, target in zip(masks.context, masks.targets[0], strict=True):
        assert bool((context.diff() > 0).all())
        assert bool((target.diff() > 0).all())
        assert torch.equal(torch.cat([context, target]).sort().values, torch.arange(patches))

    # Neither the batch nor the step plays a part.
    alone = sampler.sample(torch.tensor(images[-1:]), epoch, step=9)
    assert torch.equal(alone.context[0], masks.context[-1])
    assert torch.equal(alone.targets[:, 0], masks.targets[:, -1])


def test_224_pixels_keep_49_patches_as_published() -> None:
    assert RandomMasks((14, 14)).sample(torch.arange(2)).context.shape == (2, 49)


def test_every_patch_is_kept_as_often() -> None:
    images, kept, patches = 4000, 16, 64
    context = RandomMasks((8, 8)).sample(torch.arange(images)).context
    counts = context.flatten().bincount(minlength=patches).double()
    share = kept / patches
    assert bool(((counts - images * share).abs() < 5 * (images * share * (1 - share)) ** 0.5).all())


def test_images_epochs_and_seeds_differ() -> None:
    images = torch.arange(4)
    first = RandomMasks((8, 8)).sample(images).context
    assert len(first.unique(dim=0)) == 4
    assert not torch.equal(first, RandomMasks((8, 8)).sample(images, epoch=1).context)
    assert not torch.equal(first, RandomMasks((8, 8), seed=1).sample(images).context)
