"""What nobody reads is not computed, and nothing else changes."""

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from fastjepa.masks import Masks, MultiBlockMasks
from fastjepa.masks.multiblock import Mode
from fastjepa.masks.rows import asked_rows
from fastjepa.models import Predictor, VisionTransformer, ViTShape
from fastjepa.objectives import JEPA

SHAPE = ViTShape((28, 28), 4, 48, 2, 2)
MODES: list[Mode] = ["truncate", "budget", "packed"]


def model(skip_dead_work: bool) -> JEPA:
    torch.manual_seed(0)
    jepa = JEPA(VisionTransformer(SHAPE), Predictor(SHAPE.grid, 48, 32, 3, 2)).double()
    jepa.update_target(0.0)
    jepa.skip_dead_work = jepa.predictor.skip_dead_work = skip_dead_work
    return jepa


def drawn(mode: Mode) -> Masks:
    return MultiBlockMasks(SHAPE.grid, mode, min_keep=4).sample(torch.arange(5), step=3)


def images() -> Tensor:
    return torch.randn(5, 3, 28, 28, generator=torch.Generator().manual_seed(1)).double()


@pytest.mark.parametrize("mode", MODES)
def test_the_same_loss_and_gradients(mode: Mode) -> None:
    outcomes = []
    for skip in (False, True):
        jepa = model(skip)
        step = jepa.step(jepa.trainable(), images(), drawn(mode))
        step.loss.backward()
        gradients = {name: p.grad for name, p in jepa.trainable().named_parameters()}
        outcomes.append((step, gradients))
    (one, expected), (other, found) = outcomes
    torch.testing.assert_close(other.loss, one.loss, rtol=1e-12, atol=0)
    torch.testing.assert_close(other.prediction, one.prediction, rtol=1e-10, atol=1e-12)
    assert one.hidden is not None
    assert other.hidden is None, "not all of it was computed"
    watched = jepa.watched(other, images())
    torch.testing.assert_close(watched, one.hidden, rtol=1e-10, atol=1e-12)
    for name, gradient in expected.items():
        assert gradient is not None
        torch.testing.assert_close(found[name], gradient, rtol=1e-8, atol=1e-12)


def flops(skip: bool, mode: Mode) -> dict[str, int]:
    jepa, masks = model(skip).float(), drawn(mode)
    counts = {}
    with FlopCounterMode(display=False) as counter:
        jepa.target_hidden(images().float(), masks)
    counts["target"] = counter.get_total_flops()
    context = jepa.encoder(images().float(), masks.context, masks.cu_seqlens)
    with FlopCounterMode(display=False) as counter:
        jepa.predictor(context, masks.context, masks.targets, masks.cu_seqlens)
    counts["predictor"] = counter.get_total_flops()
    return counts


@pytest.mark.parametrize("mode", MODES)
def test_the_flops_that_go(mode: Mode) -> None:
    masks, without, with_it = drawn(mode), flops(False, mode), flops(True, mode)
    blocks, batch, asked = masks.targets.shape
    assert masks.asked_rows is not None
    # Projection and MLP of the target's last block, of width 48: 1 + 2 * 4 matrices of 48 x 48.
    left = batch * 49 - masks.asked_rows.numel()
    assert without["target"] - with_it["target"] == left * 2 * 9 * 48**2
    # The same of the predictor's, of width 32; and QKV of its first for what comes M times.
    seen = masks.context.numel()
    last, first = blocks * seen * 2 * 9 * 32**2, (blocks - 1) * seen * 2 * 3 * 32**2
    assert without["predictor"] - with_it["predictor"] == last + first


def test_rows_asked_for_are_each_once_or_as_many_in_every_batch() -> None:
    targets = torch.tensor([[[1, 2], [5, 6]], [[2, 3], [0, 5]]])  # [M, B, P] of two images of 7 patches
    rows, places = asked_rows(targets, 7, fixed=False)
    assert rows.tolist() == [1, 2, 3, 7, 12, 13]
    stream = torch.arange(2)[:, None] * 7 + targets
    assert torch.equal(rows[places], stream)
    rows, places = asked_rows(targets, 7, fixed=True)
    assert torch.equal(rows[places], stream)
    assert rows.numel() == targets.numel()


def test_masks_from_elsewhere_do_without() -> None:
    jepa, masks = model(True), drawn("budget")
    bare = Masks(masks.context, masks.targets)
    one, other = (jepa.step(jepa.trainable(), images(), each) for each in (masks, bare))
    torch.testing.assert_close(one.loss, other.loss, rtol=1e-12, atol=0)
    torch.testing.assert_close(one.prediction, other.prediction, rtol=1e-10, atol=1e-12)
