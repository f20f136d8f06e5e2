"""How sure an accuracy is, and whether two of them differ: 95 % intervals and tests, in plain floats."""

import math
from dataclasses import dataclass
from statistics import NormalDist, fmean, stdev

import torch
from torch import Tensor

_Z = NormalDist().inv_cdf(0.975)
# Student's t at 0.975, of 1 to 9 degrees of freedom.
_T = (12.706205, 4.302653, 3.182446, 2.776445, 2.570582, 2.446912, 2.364624, 2.306004, 2.262157)
SPLITS = (2, len(_T) + 1)  # how few and how many splits of labels an interval can be made of
LEVEL = 0.05  # a difference counts if chance alone gives one as large less often


@dataclass(frozen=True)
class Interval:
    """Where the true value lies with 95 % confidence."""

    low: float
    high: float


@dataclass(frozen=True)
class Difference:
    """Of two accuracies, the second less the first.

    Attributes:
        value: a fraction, with its 95 % interval.
        p: how often chance alone gives one as large; None where only the interval is known.
        differs: it is more than chance, at 95 %.
        test: by which test.
    """

    value: float
    interval: Interval
    p: float | None
    differs: bool
    test: str


def wilson(right: int, total: int) -> Interval:
    """The score interval of a fraction of `total` images (Wilson, JASA 1927).

    Unlike the textbook interval it is never empty, stays in [0, 1], and holds its level near 0 and 1.
    """
    if not 0 <= right <= total or total < 1:
        raise ValueError(f"{right} of {total} is no fraction: 0 <= right <= total, and total at least 1")
    p, z2 = right / total, _Z * _Z
    centre = (p + z2 / (2 * total)) / (1 + z2 / total)
    half = _Z / (1 + z2 / total) * math.sqrt(p * (1 - p) / total + z2 / (4 * total * total))
    low = 0.0 if right == 0 else max(0.0, centre - half)  # exactly, whatever rounding says
    return Interval(low, 1.0 if right == total else min(1.0, centre + half))


def of_splits(accuracies: list[float], total: int) -> Interval:
    """The interval of the mean accuracy over several draws of labels, tested on the same images.

    Two things are left to chance: which labels were drawn, sd / sqrt(splits) with Student's t, and which
    images were tested, p (1 - p) / total. They are added as variances. The deviation over the draws holds
    some of the second already, so this is a little wider than need be, never narrower.

    Args:
        accuracies: of each draw, 2 to 10 of them.
        total: tested images.
    """
    count, mean = len(accuracies), fmean(accuracies)
    of_labels = _t(count) * stdev(accuracies) / math.sqrt(count)
    half = math.hypot(of_labels, _Z * math.sqrt(mean * (1 - mean) / total))
    return Interval(max(0.0, mean - half), min(1.0, mean + half))


def mcnemar(first: Tensor, second: Tensor) -> Difference:
    """Two classifiers on the same images (McNemar, Psychometrika 1947), the exact test.

    Only images that one gets right and the other wrong tell them apart. If they were equal, each of those
    would be the second's with probability 1/2, so p is of a binomial. That both find most images easy does
    not blur the difference, as it does where two fractions are taken for independent.

    Args:
        first, second: bool [m], which images each gets right.
    """
    gained = int((second & ~first).sum())
    lost = int((first & ~second).sum())
    total, value = len(first), (gained - lost) / len(first)
    half = _Z * math.sqrt(max(0.0, gained + lost - (gained - lost) ** 2 / total)) / total
    p = _two_sided_binomial(min(gained, lost), gained + lost)
    interval = Interval(value - half, value + half)
    return Difference(value, interval, p, p < LEVEL, "McNemar, exact, same images")


def two_proportions(right: tuple[int, int], total: tuple[int, int]) -> Difference:
    """Two classifiers on different images: the z test of two proportions, pooled.

    Args:
        right: images that the first and the second get right,
        total: of so many.
    """
    p1, p2 = right[0] / total[0], right[1] / total[1]
    half = _Z * math.sqrt(p1 * (1 - p1) / total[0] + p2 * (1 - p2) / total[1])
    pooled = sum(right) / sum(total)
    deviation = math.sqrt(pooled * (1 - pooled) * (1 / total[0] + 1 / total[1]))
    p = math.erfc(abs(p2 - p1) / deviation / math.sqrt(2)) if deviation else 1.0
    interval = Interval(p2 - p1 - half, p2 - p1 + half)
    return Difference(p2 - p1, interval, p, p < LEVEL, "two proportions, different images")


def paired_splits(first: Tensor, second: Tensor) -> Difference:
    """Two encoders on the same draws of labels and the same images, as `of_splits` of their differences.

    Args:
        first, second: bool [splits, m], which images each gets right.
    """
    difference = second.double() - first.double()  # [splits, m]
    count, total = difference.shape
    of_labels = _t(count) * float(difference.mean(dim=1).std()) / math.sqrt(count)
    of_images = _Z * float(difference.mean(dim=0).std()) / math.sqrt(total) if total > 1 else 0.0
    value, half = float(difference.mean()), math.hypot(of_labels, of_images)
    outside = abs(value) > half
    return Difference(
        value, Interval(value - half, value + half), None, outside, "paired t of splits, same images"
    )


def apart(first: tuple[float, Interval], second: tuple[float, Interval]) -> Difference:
    """Two means with intervals of their own, nothing in common: half-widths added as variances."""
    value = second[0] - first[0]
    half = math.hypot(*((found.high - found.low) / 2 for _, found in (first, second)))
    interval = Interval(value - half, value + half)
    return Difference(value, interval, None, abs(value) > half, "intervals, different images or splits")


def _t(count: int) -> float:
    if not SPLITS[0] <= count <= SPLITS[1]:
        raise ValueError(f"{count} splits: an interval is made of {SPLITS[0]} to {SPLITS[1]}")
    return _T[count - 2]


def _two_sided_binomial(fewer: int, total: int) -> float:
    """2 P(X <= fewer) for X ~ Binomial(total, 1/2), at most 1."""
    if total == 0:
        return 1.0
    k = torch.arange(fewer + 1, dtype=torch.float64)
    n = torch.tensor(float(total), dtype=torch.float64)
    logs = torch.lgamma(n + 1) - torch.lgamma(k + 1) - torch.lgamma(n - k + 1) - n * math.log(2)
    return min(1.0, 2 * float(torch.logsumexp(logs, dim=0).exp()))
