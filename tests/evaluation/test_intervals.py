import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor

from fastjepa.evaluation.intervals import (
    SPLITS,
    Interval,
    apart,
    mcnemar,
    of_splits,
    paired_splits,
    two_proportions,
    wilson,
)

counts = st.integers(1, 3000).flatmap(lambda total: st.tuples(st.integers(0, total), st.just(total)))
bits = st.integers(2, 60).flatmap(lambda n: st.tuples(*[st.lists(st.booleans(), min_size=n, max_size=n)] * 2))


@given(counts)
def test_wilson_is_scipys(count: tuple[int, int]) -> None:
    right, total = count
    wanted = stats.binomtest(right, total).proportion_ci(0.95, method="wilson")
    found = wilson(right, total)
    assert (found.low, found.high) == pytest.approx((wanted.low, wanted.high), abs=1e-9)
    assert 0 <= found.low <= right / total <= found.high <= 1


def test_wilson_refuses_what_is_no_fraction() -> None:
    for right, total in ((-1, 5), (6, 5), (0, 0)):
        with pytest.raises(ValueError, match="is no fraction"):
            wilson(right, total)


@given(bits)
def test_mcnemar_is_a_binomial_test_of_where_they_disagree(pair: tuple[list[bool], list[bool]]) -> None:
    first, second = (torch.tensor(one) for one in pair)
    gained, lost = int((second & ~first).sum()), int((first & ~second).sum())
    found = mcnemar(first, second)
    wanted = stats.binomtest(gained, gained + lost).pvalue if gained + lost else 1.0
    assert found.p == pytest.approx(wanted, rel=1e-9)
    assert found.value == pytest.approx(second.double().mean().item() - first.double().mean().item())
    assert found.interval.low <= found.value <= found.interval.high
    back = mcnemar(second, first)
    assert (back.p, back.value) == (found.p, -found.value)


@given(counts, counts)
def test_two_proportions_is_the_chi_squared_test(one: tuple[int, int], other: tuple[int, int]) -> None:
    found = two_proportions((one[0], other[0]), (one[1], other[1]))
    right, wrong = one[0] + other[0], one[1] + other[1] - one[0] - other[0]
    if right == 0 or wrong == 0:
        assert found.p == 1
    else:
        table = [[one[0], one[1] - one[0]], [other[0], other[1] - other[0]]]
        assert found.p == pytest.approx(stats.chi2_contingency(table, correction=False).pvalue, abs=1e-9)


def test_pairing_sees_what_two_fractions_do_not() -> None:
    first = torch.arange(1000) < 800
    second = torch.arange(1000) < 815  # the same images and fifteen more
    assert mcnemar(first, second).differs
    assert not two_proportions((800, 815), (1000, 1000)).differs


@pytest.mark.parametrize("splits", range(SPLITS[0], SPLITS[1] + 1))
def test_the_mean_of_splits_has_students_interval(splits: int) -> None:
    accuracies = torch.rand(splits, generator=torch.Generator().manual_seed(splits)).tolist()
    found = of_splits(accuracies, 10**12)  # so many images leave nothing to chance
    mean, error = sum(accuracies) / splits, stats.sem(accuracies)
    wanted = stats.t.interval(0.95, splits - 1, mean, error)
    assert (found.low, found.high) == pytest.approx((max(0, wanted[0]), min(1, wanted[1])), abs=1e-6)


def test_equal_splits_leave_the_chance_of_the_images() -> None:
    found = of_splits([0.5] * 4, 100)
    assert found.high - 0.5 == pytest.approx(stats.norm.ppf(0.975) * math.sqrt(0.25 / 100))
    for count in (1, SPLITS[1] + 1):
        with pytest.raises(ValueError, match="an interval is made of 2 to 10"):
            of_splits([0.5] * count, 100)


def drawn(accuracy: float, seed: int) -> Tensor:
    return torch.rand(5, 400, generator=torch.Generator().manual_seed(seed)) < accuracy


def test_differences_of_splits() -> None:
    same = paired_splits(drawn(0.7, 0), drawn(0.7, 0))
    assert (same.value, same.differs) == (0, False)
    better = paired_splits(drawn(0.5, 0), drawn(0.7, 1))
    assert better.differs
    assert better.interval.low < 0.2 < better.interval.high
    # What all draws share cancels out.
    shared = drawn(0.5, 2)
    more = shared.clone()
    more[:, :8] = True
    assert paired_splits(shared, more).interval.high < 0.03
    assert not apart((0.70, Interval(0.68, 0.72)), (0.72, Interval(0.70, 0.74))).differs
    assert apart((0.70, Interval(0.68, 0.72)), (0.73, Interval(0.71, 0.75))).differs


def test_intervals_hold_their_level() -> None:
    # Of 4,000 draws at an accuracy where a textbook interval fails, about 95 % hold it.
    generator = torch.Generator().manual_seed(0)
    right = (torch.rand(4000, 40, generator=generator) < 0.95).sum(dim=1).tolist()
    held = sum((found := wilson(r, 40)).low <= 0.95 <= found.high for r in right) / 4000
    assert 0.93 < held < 0.97
