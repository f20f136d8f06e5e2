"""What the spectrum and the spread of features tell of them without labels.

Each is one number of pooled features; none of them alone ranks encoders. RankMe is in `collapse`, which
watches a run with it.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from fastjepa.evaluation.collapse import effective_rank

_LIDAR_RIDGE = 1e-4  # delta of the paper, on the within-object covariance
_ALPHA_RANKS = (11, 50)  # eigenvalues that the line is fitted to, counted from 1, both included
_FEWEST_RANKS = 3  # a line through two points always fits
_PAIRS_AT_ONCE = 1 << 24  # of float64: 128 MiB


@torch.no_grad()
def dimension_std(z: Tensor) -> Tensor:
    """The deviation of each dimension over images, of features of unit length: [D], fp32.

    Multiplied by sqrt(D), as in SimSiam (arXiv:2011.10566, figure 2): about 1 for directions spread evenly
    over the sphere, 0 where all images have the same feature.

    Args:
        z: [n, D].
    """
    return F.normalize(z.float(), dim=1).std(dim=0) * z.shape[1] ** 0.5


@torch.no_grad()
def uniformity(z: Tensor, t: float = 2.0) -> float:
    """log of the mean over pairs of exp(-t |x - y|^2), of features of unit length.

    Wang & Isola, ICML 2020, arXiv:2005.10242: 0 if all are the same, about -2t at best, where they are
    spread over the sphere.

    Args:
        z: [n, D], n at least 2. All n (n - 1) / 2 pairs are looked at.
    """
    if len(z) < 2:
        raise ValueError(f"uniformity is of pairs, and there is {len(z)} feature: give at least 2")
    z = F.normalize(z.double(), dim=1)
    total = z.new_zeros(())
    for some in z.split(max(1, _PAIRS_AT_ONCE // len(z))):
        squared = (2 - 2 * (some @ z.T)).clamp_min(0)  # [b, n]
        total += torch.exp(-t * squared).sum()
    # Each feature with itself gives 1.
    return float(((total - len(z)) / (len(z) * (len(z) - 1))).log())


@torch.no_grad()
def alpha_req(z: Tensor) -> float:
    """The exponent of the power law lambda_i ~ i^-alpha that the covariance's eigenvalues follow.

    alpha-ReQ (Agrawal et al., NeurIPS 2022): near 1 the features keep many dimensions and are still smooth;
    far above it few dimensions count, far below it they are noise. The line log lambda over log i is fitted
    with weights 1 / i, which even out the points of a logarithmic axis, to the eigenvalues 11 to 50, or to
    all from the first where there are not so many.

    Args:
        z: [n, D], n above D.

    Returns:
        alpha; NaN if a feature is not finite, or if fewer than 3 eigenvalues are above rounding.
    """
    z = z.double()
    if not torch.isfinite(z).all():
        return torch.nan
    z = z - z.mean(dim=0)
    values = torch.linalg.eigvalsh(z.T @ z / max(1, len(z) - 1)).flip(0)  # [D], descending
    values = values[values > 1e-12 * values[0]]
    first, last = _ALPHA_RANKS
    if len(values) < last:
        first, last = 1, len(values)
    rank = torch.arange(first, last + 1, dtype=torch.float64, device=z.device)
    if len(rank) < _FEWEST_RANKS:
        return torch.nan
    x, y, weight = rank.log(), values[first - 1 : last].log(), 1 / rank
    x, y = x - (weight * x).sum() / weight.sum(), y - (weight * y).sum() / weight.sum()
    return float(-(weight * x * y).sum() / (weight * x * x).sum())


@torch.no_grad()
def lidar(views: Tensor) -> float:
    """The effective rank of what tells images apart and does not change with the view of them.

    LiDAR (Thilak et al., ICLR 2024, arXiv:2312.04000): with S_b the covariance of the mean feature of each
    image and S_w that of views around those means, the effective rank, as of RankMe, of the eigenvalues of
    (S_w + delta)^-1/2 S_b (S_w + delta)^-1/2. RankMe also counts dimensions that hold noise; this does not.

    Args:
        views: [n, q, D], q random views of each of n images, both at least 2. It is at most n - 1.

    Returns:
        In about [1, min(n - 1, D)]; NaN if a feature is not finite.
    """
    count, each, width = views.shape
    if count < 2 or each < 2:
        raise ValueError(f"LiDAR is of at least 2 views of at least 2 images, got {each} of {count}")
    views = views.double()
    if not torch.isfinite(views).all():
        return torch.nan
    means = views.mean(dim=1)  # [n, D]
    around = (views - means[:, None]).flatten(0, 1)  # [n q, D]
    within = around.T @ around / (count * (each - 1))  # [D, D]
    within += _LIDAR_RIDGE * torch.eye(width, dtype=within.dtype, device=within.device)
    centred = means - means.mean(dim=0)
    # With L L^T = S_w + delta, L^-1 S_b L^-T has the same eigenvalues as the symmetric root's product.
    whitened = torch.linalg.solve_triangular(torch.linalg.cholesky(within), centred.T, upper=False)  # [D, n]
    between = whitened @ whitened.T / (count - 1)
    return float(effective_rank(torch.linalg.eigvalsh(between).clamp_min(0)))
