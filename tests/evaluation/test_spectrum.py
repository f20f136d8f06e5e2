import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fastjepa.data.fashion_mnist import FashionMNIST
from fastjepa.evaluation import rankme
from fastjepa.evaluation import spectrum as spectrum_module
from fastjepa.evaluation.spectrum import alpha_req, dimension_std, lidar, uniformity


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_uniformity_is_over_all_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    z = FashionMNIST(split="test").images[:90].flatten(1).double()
    unit = z / z.norm(dim=1, keepdim=True)
    wanted = torch.exp(-2 * torch.pdist(unit).square()).mean().log().item()
    assert uniformity(z) == pytest.approx(wanted, abs=1e-10)
    monkeypatch.setattr(spectrum_module, "_PAIRS_AT_ONCE", 7 * 90)
    assert uniformity(z) == pytest.approx(wanted, abs=1e-10)


def test_uniformity_of_a_point_and_of_a_sphere() -> None:
    assert uniformity(torch.ones(20, 8)) == pytest.approx(0, abs=1e-12)
    # exp(-2 (2 - 2 cos)), cos of variance 1 / D: log of the mean is about -4 + 8 / D.
    assert uniformity(normal(2000, 256)) == pytest.approx(-4 + 8 / 256, abs=0.01)
    with pytest.raises(ValueError, match="at least 2"):
        uniformity(torch.ones(1, 8))


@pytest.mark.parametrize("alpha", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("width", [12, 80])
def test_alpha_is_the_exponent_of_the_spectrum(alpha: float, width: int) -> None:
    basis, _ = torch.linalg.qr(normal(500, width) - normal(500, width).mean(dim=0))
    basis = torch.linalg.qr(basis - basis.mean(dim=0))[0]  # columns orthonormal, without a mean
    rotation, _ = torch.linalg.qr(normal(width, width, seed=1))
    spread = torch.arange(1, width + 1, dtype=torch.float64) ** (-alpha / 2)
    assert alpha_req(basis * spread @ rotation + 5) == pytest.approx(alpha, abs=1e-6)


def test_alpha_of_what_has_no_spectrum() -> None:
    assert math.isnan(alpha_req(torch.ones(50, 8)))
    assert math.isnan(alpha_req(torch.full((50, 8), math.nan)))


def reference_lidar(views: Tensor) -> float:
    """As the paper writes it, with the symmetric root and sums over images."""
    count, each, width = views.shape
    mean = views.mean(dim=(0, 1))
    of_images = views.mean(dim=1)
    between = sum(torch.outer(m - mean, m - mean) for m in of_images) / (count - 1)
    within = sum(torch.outer(v - m, v - m) for m, vs in zip(of_images, views, strict=True) for v in vs)
    within = within / (count * (each - 1)) + 1e-4 * torch.eye(width, dtype=torch.float64)
    values, vectors = torch.linalg.eigh(within)
    root = vectors @ torch.diag(values.rsqrt()) @ vectors.T
    eigenvalues = torch.linalg.eigvalsh(root @ between @ root).clamp_min(0)
    p = eigenvalues / eigenvalues.sum() + 1e-7
    return math.exp(-(p * p.log()).sum().item())


def test_lidar_is_the_papers() -> None:
    scale = torch.linspace(0.1, 2, 10, dtype=torch.float64)
    views = normal(40, 1, 10) * scale + 0.3 * normal(40, 6, 10, seed=1)
    assert lidar(views) == pytest.approx(reference_lidar(views), rel=1e-9)


def test_lidar_does_not_count_what_a_view_changes() -> None:
    told_apart, noise = normal(300, 1, 4).expand(-1, 8, -1), normal(300, 8, 28, seed=1)
    views = torch.cat([told_apart + 0.1 * normal(300, 8, 4, seed=2), noise], dim=2)  # [300, 8, 32]
    assert lidar(views) < 7
    assert rankme(views.mean(dim=1)) > 20
    assert math.isnan(lidar(views * math.nan))
    for shape in ((1, 8, 4), (8, 1, 4)):
        with pytest.raises(ValueError, match="at least 2 views of at least 2 images"):
            lidar(torch.ones(shape))


@given(scale=st.floats(0.01, 100), seed=st.integers(0, 20))
def test_std_of_dimensions_does_not_depend_on_the_scale(scale: float, seed: int) -> None:
    z = normal(400, 64, seed=seed)
    found = dimension_std(z * scale)
    torch.testing.assert_close(found, dimension_std(z), rtol=1e-4, atol=1e-5)
    assert found.mean().item() == pytest.approx(1, abs=0.03)


def test_std_of_dimensions_sees_both_kinds_of_collapse() -> None:
    assert dimension_std(torch.ones(50, 16) + 1e-6 * torch.rand(50, 16)).max() < 1e-4
    half = normal(400, 64)
    half[:, 32:] = 0
    assert (dimension_std(half) < 0.01).double().mean() == 0.5
