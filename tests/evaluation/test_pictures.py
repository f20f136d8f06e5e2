import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastjepa.data.fashion_mnist import FashionMNIST
from fastjepa.evaluation import patch_pca
from fastjepa.evaluation.pictures import share_of_three

GRID = (7, 7)


@pytest.fixture(scope="module")
def features() -> Tensor:
    """Random features [6, 49, 24] of real patches."""
    images = FashionMNIST(split="test").images[:6].float() / 255
    weight = torch.randn(16, 24, generator=torch.Generator().manual_seed(0))
    return torch.nn.functional.unfold(images, 4, stride=4).mT @ weight


def test_colours_fill_the_unit_range(features: Tensor) -> None:
    (picture,) = patch_pca([features.half()], GRID)
    assert picture.shape == (6, 7, 7, 3)
    assert picture.dtype == torch.float32
    for channel in picture.unbind(-1):
        assert channel.min() == 0
        assert channel.max() == 1


def test_the_share_of_three_components() -> None:
    axes = torch.eye(5)[:, None] * torch.tensor([3.0, 2.0, 1.0, 1.0, 1.0])[:, None, None]  # [5, 1, 5]
    z = torch.cat([axes, -axes])
    assert share_of_three(z.half()) == pytest.approx(14 / 16)
    assert share_of_three(z[..., :3]) == pytest.approx(1)
    assert share_of_three(torch.ones(2, 4, 5)) == 0


@settings(deadline=None)
@given(seed=st.integers(0, 50), scale=st.floats(0.01, 100))
def test_colours_do_not_depend_on_the_basis(seed: int, scale: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    spread = torch.tensor([8.0, 4.0, 2.0, 1.0, 1.0])
    z = torch.randn(3, 4, 5, generator=generator, dtype=torch.float64) * spread
    rotation, _ = torch.linalg.qr(torch.randn(5, 5, generator=generator, dtype=torch.float64))
    start, end = patch_pca([z, scale * (z @ rotation) + 7], (2, 2))
    torch.testing.assert_close(start, end, rtol=0, atol=1e-4)


def test_colours_are_turned_towards_the_last_time_and_stay_its_own(features: Tensor) -> None:
    """The same three components in another order, alike in size: an eigenvalue says nothing of the hue."""
    z = torch.randn(6, 49, 24, generator=torch.Generator().manual_seed(1))
    z = z * torch.tensor([9.0, 6.0, 4.0] + [0.1] * 21)
    reordered = z * torch.tensor([4.0 / 9, 1.0, 9.0 / 4] + [1.0] * 21)
    start, end = patch_pca([reordered, z], GRID)
    torch.testing.assert_close(start, end, rtol=0, atol=0.02)
    assert torch.equal(end, patch_pca([z], GRID)[0])  # the last is as if it were alone

    unlike, _ = patch_pca([features, z], GRID)
    colours = torch.stack([unlike, end]).flatten(1, 3)  # [2, r, 3]
    agreement = [torch.corrcoef(colours[..., channel])[0, 1] for channel in range(3)]
    assert max(agreement) < 0.5  # what is not alike is not made so


def test_one_odd_patch_does_not_set_the_scale(features: Tensor) -> None:
    odd = features.clone()
    odd[0, 0] = 1000
    (picture,) = patch_pca([odd], GRID)
    assert picture[1:, ..., 0].std() + picture[1:, ..., 1].std() > 0.1


def test_collapsed_features_are_grey(features: Tensor) -> None:
    collapsed = torch.ones(6, 49, 24) + 1e-7 * features
    _, picture = patch_pca([features, collapsed], GRID)
    assert torch.equal(picture, torch.full((6, 7, 7, 3), 0.5))


def test_widths_may_differ_and_be_small(features: Tensor) -> None:
    wide, narrow = patch_pca([features, features[..., :2]], GRID)
    assert narrow.shape == wide.shape
    assert torch.all(narrow[..., 2] == 0.5)


def test_errors_say_what_is_expected(features: Tensor) -> None:
    with pytest.raises(ValueError, match="on a 4 by 4 grid"):
        patch_pca([features], (4, 4))
    with pytest.raises(ValueError, match="for 6 images"):
        patch_pca([features, features[:5]], GRID)
    with pytest.raises(ValueError, match="not all finite"):
        patch_pca([features * torch.inf], GRID)
