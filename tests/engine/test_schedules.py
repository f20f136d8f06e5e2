"""The published schedules: arXiv:2301.08243, appendix A.1."""

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastjepa.engine.schedules import Schedule, cosine

PUBLISHED = Schedule(
    steps=187_500,  # 300 epochs of 1.28 million images in batches of 2048
    warmup_steps=25_000,
    lr=1e-3,
    start_lr=2e-4,
    final_lr=1e-6,
    weight_decay=0.04,
    final_weight_decay=0.4,
    momentum=0.996,
    final_momentum=1.0,
)

rate = st.floats(0, 10)


@st.composite
def schedules(draw: st.DrawFn) -> Schedule:
    steps = draw(st.integers(1, 1000))
    rates: dict[str, Any] = {
        name: draw(rate) for name in ("lr", "start_lr", "final_lr", "weight_decay", "final_weight_decay")
    }
    low, high = sorted((draw(st.floats(0, 1)), draw(st.floats(0, 1))))
    return Schedule(steps, draw(st.integers(0, steps)), **rates, momentum=low, final_momentum=high)


def test_published_values() -> None:
    first, last = PUBLISHED.at(0), PUBLISHED.at(PUBLISHED.steps - 1)
    assert first.lr == pytest.approx(2e-4, rel=1e-3)
    assert first.momentum == 0.996
    assert first.weight_decay == pytest.approx(0.04)
    assert PUBLISHED.at(12_499).lr == pytest.approx(6e-4)  # half of the warm-up
    assert PUBLISHED.at(24_999).lr == pytest.approx(1e-3)
    assert PUBLISHED.at(106_249).lr == pytest.approx((1e-3 + 1e-6) / 2)  # half of the cosine
    assert PUBLISHED.at(93_750).momentum == pytest.approx(0.998)
    assert PUBLISHED.at(93_749).weight_decay == pytest.approx(0.22)
    assert (last.lr, last.weight_decay, last.momentum) == pytest.approx((1e-6, 0.4, 1.0))


@given(schedules(), st.data())
def test_rates_stay_between_their_ends(schedule: Schedule, data: st.DataObject) -> None:
    rates = schedule.at(data.draw(st.integers(0, schedule.steps - 1)))
    tolerance = 1e-9
    ends = (schedule.start_lr, schedule.lr, schedule.final_lr)
    assert min(ends) - tolerance <= rates.lr <= max(ends) + tolerance
    decays = (schedule.weight_decay, schedule.final_weight_decay)
    assert min(decays) - tolerance <= rates.weight_decay <= max(decays) + tolerance
    assert schedule.momentum - tolerance <= rates.momentum <= schedule.final_momentum + tolerance


@given(schedules())
def test_ends_are_reached(schedule: Schedule) -> None:
    last = schedule.at(schedule.steps - 1)
    after_warmup = schedule.final_lr if schedule.warmup_steps < schedule.steps else schedule.lr
    assert last.lr == pytest.approx(after_warmup, abs=1e-9)
    assert last.weight_decay == pytest.approx(schedule.final_weight_decay, abs=1e-9)
    assert schedule.at(0).momentum == schedule.momentum
    if schedule.warmup_steps:
        assert schedule.at(schedule.warmup_steps - 1).lr == pytest.approx(schedule.lr, abs=1e-9)


@given(schedules(), st.data())
def test_warmup_and_momentum_are_straight_lines(schedule: Schedule, data: st.DataObject) -> None:
    step = data.draw(st.integers(0, schedule.steps - 1))
    share = step / schedule.steps
    expected = (1 - share) * schedule.momentum + share * schedule.final_momentum
    assert schedule.at(step).momentum == pytest.approx(expected, abs=1e-12)
    if step < schedule.warmup_steps:
        share = (step + 1) / schedule.warmup_steps
        expected = (1 - share) * schedule.start_lr + share * schedule.lr
        assert schedule.at(step).lr == pytest.approx(expected, abs=1e-9)


@given(rate, rate, st.floats(0, 1))
def test_cosine(start: float, end: float, done: float) -> None:
    assert cosine(start, end, 0) == pytest.approx(start, abs=1e-12)
    assert cosine(start, end, 1) == pytest.approx(end, abs=1e-12)
    assert cosine(start, end, 0.5) == pytest.approx((start + end) / 2, abs=1e-9)
    # Symmetric about its middle, flat at both ends.
    assert cosine(start, end, done) + cosine(start, end, 1 - done) == pytest.approx(start + end, abs=1e-9)
    slope = (cosine(start, end, 1e-4) - start) / 1e-4
    assert math.isclose(slope, 0, abs_tol=1e-2)


@pytest.mark.parametrize(("steps", "warmup", "message"), [(0, 0, "optimizer step"), (5, 6, "6 of 5 steps")])
def test_impossible_lengths_are_refused(steps: int, warmup: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Schedule(steps, warmup, 1.0, 1.0, 1.0, 0.0, 0.0, 0.9, 1.0)
