"""Patch features as colours: the first three principal components as red, green and blue."""

from collections.abc import Sequence

import torch
from torch import Tensor

_PERCENTILES = (0.02, 0.98)  # what lies outside is clipped: a few odd patches must not set the scale
_FLAT = 1e-5  # a component spreading less than this part of the features' size is rounding
_GREY = 0.5


@torch.no_grad()
def patch_pca(features: Sequence[Tensor], grid: tuple[int, int]) -> list[Tensor]:
    """Colours for the patch features of the same images at several times.

    Each time has a PCA of its own, over all patches of all its images, because features of two
    times do not share a basis. What a PCA leaves open, signs and, where components are alike in size,
    their order, is chosen so that colours agree as well as they can with the last time: its three
    components, each of unit deviation, are turned by the orthogonal matrix of least squares (Procrustes).
    So one hue may be followed over time as far as the patches it stands for stay together.

    Args:
        features: one [n, N, D] per time, any float type, the same images in the same order;
            D may differ between times.
        grid: patches (down, across); their product is N.

    Returns:
        One fp32 [n, h, w, 3] in [0, 1] per time. Equal colours mean alike patches within one time.
        A component without variance is 0.5 everywhere, so collapsed features are plain grey.

    Raises:
        ValueError: a shape that is not [n, N, D] with the n of the others, or a feature that is not finite.
    """
    scores: list[Tensor] = []
    for z in features:
        if z.ndim != 3 or z.shape[1] != grid[0] * grid[1] or len(z) != len(features[0]):
            raise ValueError(
                f"features are {list(z.shape)}; expected [{len(features[0])}, {grid[0] * grid[1]}, width] "
                f"for {len(features[0])} images on a {grid[0]} by {grid[1]} grid"
            )
        if not torch.isfinite(z).all():
            raise ValueError("the patch features are not all finite: the encoder has diverged")
        scores.append(_three_components(z.double().flatten(0, 1)))  # [n*N, 3]
    turned = [_turned(time, scores[-1]) for time in scores]
    return [_to_unit_range(time).float().unflatten(0, (-1, *grid)) for time in turned]  # [n, h, w, 3]


@torch.no_grad()
def share_of_three(features: Tensor) -> float:
    """How much of the variance of patch features [n, N, D] their first three components hold, 0 to 1.

    0 where nothing varies.
    """
    rows = features.double().flatten(0, 1)  # [n*N, D]
    rows = rows - rows.mean(dim=0)
    variances = torch.linalg.eigvalsh(rows.T @ rows).clamp_min(0)  # [D], ascending
    return float(variances[-3:].sum() / variances.sum().clamp_min(torch.finfo(torch.float64).tiny))


def _three_components(rows: Tensor) -> Tensor:
    """Scores [r, 3] of rows [r, D] on their first components, of unit deviation, larger tail positive."""
    size = rows.abs().max()
    rows = rows - rows.mean(dim=0)
    _, directions = torch.linalg.eigh(rows.T @ rows)  # [D, D], ascending
    scores = rows @ directions.flip(1)[:, :3]  # [r, 3], or fewer when D < 3
    scores = scores * _sign(scores.pow(3).sum(dim=0))
    deviation = scores.std(dim=0)
    scores = torch.where(deviation > _FLAT * size, scores / deviation, 0.0)
    return torch.nn.functional.pad(scores, (0, 3 - scores.shape[1]))


def _turned(scores: Tensor, reference: Tensor) -> Tensor:
    """Scores [r, 3] turned to agree with the reference; only signs change where a component is missing."""
    if all(bool(time.any(dim=0).all()) for time in (scores, reference)):
        left, _, right = torch.linalg.svd(scores.T @ reference)  # [3, 3]
        return scores @ left @ right
    return scores * _sign((scores * reference).sum(dim=0))


def _to_unit_range(scores: Tensor) -> Tensor:
    low, high = torch.quantile(scores, torch.tensor(_PERCENTILES, dtype=scores.dtype), dim=0)  # [3], [3]
    spread = high - low
    return torch.where(spread > 0, (scores - low) / spread, _GREY).clamp(0, 1)


def _sign(x: Tensor) -> Tensor:
    return torch.where(x < 0, -1.0, 1.0)
