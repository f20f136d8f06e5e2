"""Spikes in losses: none in curves of real runs, and soon seen where one is planted."""

import json
import math
import random
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastjepa.engine.spikes import IN_A_ROW, KEPT, WINDOW, Spike, find_spike, highest_usual, may_roll_back

# The loss of every step of real runs: `fashion_mnist` is what `make train` prints the means of.
CURVES: dict[str, list[float]] = json.loads((Path(__file__).parent / "losses.json").read_text())

real_curves = pytest.mark.parametrize("name", CURVES)
steps_of_a_curve = st.integers(3 * WINDOW, min(map(len, CURVES.values())) - 40)  # after the steep fall
losses = st.lists(st.floats(0.01, 10), max_size=3 * WINDOW)


def longest_above(curve: list[float], part: float) -> int:
    """How many losses in a row are above the limit, if the limit is so much nearer to the median."""
    longest = in_a_row = 0
    for i in range(WINDOW, len(curve)):
        before = curve[i - WINDOW : i]
        middle = sorted(before)[WINDOW // 2]
        above = curve[i] > middle + part * (highest_usual(before) - middle)
        in_a_row = in_a_row + 1 if above else 0
        longest = max(longest, in_a_row)
    return longest


@real_curves
def test_no_false_alarm_on_a_real_curve_nor_with_limits_half_as_high(name: str) -> None:
    assert find_spike(CURVES[name], len(CURVES[name])) is None
    assert longest_above(CURVES[name], 1.0) < IN_A_ROW - 1
    assert longest_above(CURVES[name], 0.6) < IN_A_ROW


@real_curves
@given(at=steps_of_a_curve, height=st.floats(2.5, 100.0))
def test_a_planted_spike_is_seen_within_a_few_steps(name: str, at: int, height: float) -> None:
    planted = [*CURVES[name][:at], *(height * loss for loss in CURVES[name][at : at + 40])]
    looks = ((n, find_spike(planted[n - KEPT : n], n)) for n in range(at, len(planted) + 1))
    seen, spike = next((n, spike) for n, spike in looks if spike is not None)
    assert seen <= at + IN_A_ROW + 4  # one or the other step may be a low one
    assert abs(spike.step - (at + 1)) <= IN_A_ROW


@given(losses)
def test_what_never_rises_is_no_spike(values: list[float]) -> None:
    falling = sorted(values, reverse=True)
    assert find_spike(falling, len(falling)) is None


@given(losses, st.sampled_from([0.125, 0.5, 4.0, 1024.0]), st.integers(0, 3 * WINDOW))
def test_the_scale_of_the_loss_does_not_matter(values: list[float], scale: float, at: int) -> None:
    values = values[:at] + [3 * value for value in values[at:]]
    one, other = find_spike(values, 500), find_spike([scale * value for value in values], 500)
    assert (one and one.step) == (other and other.step)


@given(st.randoms(use_true_random=False), st.integers(1, 40), st.integers(WINDOW, 150))
def test_found_alike_whenever_it_is_looked_for(dice: random.Random, every: int, at: int) -> None:
    """Looking every few steps at what is kept is as good as looking at all of it, so a resumed run agrees."""
    values = [dice.uniform(0.9, 1.1) * (2.5 if at <= i < at + 30 else 1.0) for i in range(220)]
    told: list[int] = []
    kept: list[float] = []
    for end in range(every, len(values) + 1, every):
        kept += values[end - every : end]
        spike = find_spike(kept, end, told[-1] if told else 0)
        if spike is not None:
            told.append(spike.step)
        kept = kept[-KEPT:]
    whole = find_spike(values, len(values))
    seen_to = len(values) // every * every
    assert told == ([whole.step] if whole is not None and seen_to >= at + IN_A_ROW else [])
    assert whole is not None
    assert whole.step == at + 1


def test_steps_that_are_no_number_are_neither_usual_nor_a_spike() -> None:
    usual = [1.0, 1.01] * WINDOW
    assert find_spike([*usual, *[math.nan] * 20], 200) is None
    assert find_spike([*usual, math.inf, math.nan, math.inf, math.nan, 1.0], 200) is None
    gaps = [math.nan if i % 3 == 0 else loss for i, loss in enumerate(usual)]
    assert find_spike([*gaps, *[2.0] * IN_A_ROW], 200) == Spike(200 - IN_A_ROW + 1, 2.0, 1.01)
    assert find_spike([*[math.nan] * WINDOW, *[2.0] * IN_A_ROW], 200) is None


def test_one_step_more_or_less() -> None:
    usual = [1.0] * WINDOW
    assert find_spike([*usual, *[2.0] * (IN_A_ROW - 1)], 1000) is None
    assert find_spike([*usual[1:], *[2.0] * IN_A_ROW], 1000) is None
    found = find_spike([*usual, *[2.0] * IN_A_ROW], WINDOW + IN_A_ROW)
    assert found == Spike(WINDOW + 1, 2.0, 1.0)
    assert str(found) == f"the loss rose from 1 to 2 at step {WINDOW + 1}"


@given(st.integers(1, 10_000), st.integers(0, 10_000), st.integers(1, 2000))
def test_a_run_goes_forward_more_than_back(step: int, rolled_back: int, save_every: int) -> None:
    again = may_roll_back(Spike(step, 2.0, 1.0), rolled_back, save_every)
    assert again == (rolled_back == 0 or step > rolled_back + max(save_every, WINDOW))
