import pytest
import torch

from fastjepa.masks import Masks, MultiBlockMasks
from fastjepa.masks.buckets import CONTEXT_STEP, in_buckets
from fastjepa.masks.multiblock import Mode
from fastjepa.models import Predictor, VisionTransformer, ViTShape
from fastjepa.objectives import JEPA

SHAPE = ViTShape((28, 28), 4, 48, 2, 2)
MODES: list[Mode] = ["truncate", "packed"]
BATCH = 5


def drawn(mode: Mode, step: int = 3, grid: tuple[int, int] = SHAPE.grid, batch: int = BATCH) -> Masks:
    return MultiBlockMasks(grid, mode, min_keep=4).sample(torch.arange(batch), step=step)


@pytest.mark.parametrize("mode", MODES)
def test_the_tokens_are_the_same_and_rows_lie_behind_them(mode: Mode) -> None:
    masks = drawn(mode)
    rounded = in_buckets(masks)
    assert rounded.cu_seqlens is not None
    end = int(rounded.cu_seqlens[-1])
    assert torch.equal(rounded.context[:end], masks.context.flatten())
    assert end <= len(rounded.context) < end + BATCH * CONTEXT_STEP
    assert rounded.targets is masks.targets
    lengths = rounded.cu_seqlens.diff()
    if mode == "truncate":
        assert lengths.tolist() == [masks.context.shape[1]] * BATCH
        assert rounded.longest is not None
        assert lengths.max() <= rounded.longest < lengths.max() + CONTEXT_STEP
    else:
        assert rounded.cu_seqlens is masks.cu_seqlens
    assert masks.asked_rows is not None
    assert rounded.asked_rows is not None
    assert torch.equal(rounded.asked_rows[: len(masks.asked_rows)], masks.asked_rows)
    assert len(rounded.asked_rows) % BATCH == 0


@pytest.mark.parametrize("mode", MODES)
def test_the_same_loss_and_gradients(mode: Mode) -> None:
    torch.manual_seed(0)
    jepa = JEPA(VisionTransformer(SHAPE), Predictor(SHAPE.grid, 48, 32, 3, 2)).double()
    images, masks = torch.randn(BATCH, 3, 28, 28).double(), drawn(mode)
    outcomes = []
    for each in (masks, in_buckets(masks)):
        step = jepa.step(jepa.trainable(), images, each)
        outcomes.append([step.loss, *torch.autograd.grad(step.loss, list(jepa.trainable().parameters()))])
    for one, other in zip(*outcomes, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-13)


@pytest.mark.parametrize(("mode", "most"), [("truncate", 45), ("packed", 110)])
def test_few_shapes(mode: Mode, most: int) -> None:
    """Of 300 steps as a run has them, each shape of which would be captured."""
    shapes = set()
    for step in range(300):
        masks = in_buckets(drawn(mode, step, grid=(14, 14), batch=64))
        assert masks.asked_rows is not None
        shapes.add((masks.context.shape, masks.targets.shape, masks.asked_rows.shape, masks.longest))
    assert len(shapes) <= most
