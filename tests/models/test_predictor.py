from itertools import accumulate

import pytest
import torch
from torch import Tensor

from fastjepa.models import Predictor

PATCHES, BLOCKS, BATCH, WIDTH = 20, 3, 4, 16


def predictor(width: int = 48, heads: int = 2) -> Predictor:
    """With weights that leave no bias at 0 and no norm at 1."""
    torch.manual_seed(0)
    model = Predictor((4, 5), WIDTH, width, depth=2, heads=heads).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) / 10)
    return model


def places(*shape: int, seed: int = 0) -> Tensor:
    """Different positions in every list: int64 [..., n]."""
    random = torch.Generator().manual_seed(seed)
    return torch.rand(*shape[:-1], PATCHES, generator=random).argsort(dim=-1)[..., : shape[-1]]


def tokens(count: int) -> Tensor:
    return torch.randn(count, WIDTH, generator=torch.Generator().manual_seed(3)).double()


@pytest.mark.parametrize(("width", "heads"), [(48, 2), (64, 2)])
def test_packed_is_dense(width: int, heads: int) -> None:
    model = predictor(width, heads)
    index, targets = places(BATCH, 6), places(BLOCKS, BATCH, 5, seed=1)
    context = tokens(BATCH * 6).requires_grad_()
    dense = model(context.view(BATCH, 6, WIDTH), index, targets)
    packed = model(context, index.flatten(), targets, torch.arange(BATCH + 1, dtype=torch.int32) * 6)
    assert dense.shape == (BLOCKS, BATCH, 5, WIDTH)
    torch.testing.assert_close(packed, dense, rtol=1e-10, atol=1e-11)
    inputs = [context, *model.parameters()]
    wanted = torch.autograd.grad(dense.square().mean(), inputs)
    got = torch.autograd.grad(packed.square().mean(), inputs)
    torch.testing.assert_close(got, wanted, rtol=1e-8, atol=1e-11)


@pytest.mark.parametrize("past_the_end", [0, 3])
def test_packed_images_are_as_if_alone(past_the_end: int) -> None:
    model, lengths = predictor(), [5, 1, 0, 9]
    starts = torch.tensor([*accumulate(lengths, initial=0)], dtype=torch.int32)
    index = torch.cat([places(length) for length in lengths] + [torch.zeros(past_the_end, dtype=torch.long)])
    context, targets = tokens(15 + past_the_end), places(BLOCKS, BATCH, 5, seed=1)
    packed = model(context, index, targets, starts)
    for image, (own, own_index) in enumerate(
        zip(context[:15].split(lengths), index[:15].split(lengths), strict=True)
    ):
        alone = model(own[None], own_index[None], targets[:, image : image + 1])
        torch.testing.assert_close(packed[:, image], alone[:, 0], rtol=1e-10, atol=1e-11)


def test_blocks_do_not_see_each_other() -> None:
    model, index = predictor(), places(BATCH, 6)
    context, targets = tokens(BATCH * 6).view(BATCH, 6, WIDTH), places(BLOCKS, BATCH, 5, seed=1)
    together = model(context, index, targets)
    for block in range(BLOCKS):
        torch.testing.assert_close(model(context, index, targets[block : block + 1])[0], together[block])


def test_predictions_come_in_the_order_asked_for() -> None:
    model, index = predictor(), places(BATCH, 6)
    context, targets = tokens(BATCH * 6).view(BATCH, 6, WIDTH), places(BLOCKS, BATCH, 5, seed=1)
    out = model(context, index, targets)
    torch.testing.assert_close(model(context, index, targets.flip(2)), out.flip(2))
    # Tokens are told apart by their positions, not by their order.
    torch.testing.assert_close(model(context.flip(1), index.flip(1), targets), out)
    assert not torch.allclose(model(context.flip(1), index, targets), out)
    assert not torch.allclose(out[..., 0, :], out[..., 1, :])
    assert model(context, index, targets[:, :, :0]).shape == (BLOCKS, BATCH, 0, WIDTH)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (places(BATCH, 5), r"target_index must be \[M, B, P\] with B = 4"),
        (places(BLOCKS, BATCH - 1, 5), r"target_index must be \[M, B, P\] with B = 4"),
        (places(BLOCKS, BATCH, 5) - 1, r"target_index must lie in 0\.\.19"),
        (places(BLOCKS, BATCH, 5) + 16, r"target_index must lie in 0\.\.19"),
        (places(BLOCKS, BATCH, 5).double(), "target_index must hold integers"),
    ],
)
def test_targets_outside_the_grid_are_refused(packed: bool, targets: Tensor, message: str) -> None:
    context, index, starts = tokens(BATCH * 6).view(BATCH, 6, WIDTH), places(BATCH, 6), None
    if packed:
        context, index = context.flatten(0, 1), index.flatten()
        starts = torch.arange(BATCH + 1, dtype=torch.int32) * 6
    with pytest.raises(ValueError, match=message):
        predictor()(context, index, targets, starts)
