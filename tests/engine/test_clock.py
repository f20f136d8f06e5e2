import time

import pytest

from fastjepa.engine.clock import Lap, StepClock, add_times


def test_a_lap_is_divided_and_the_next_begins_at_zero() -> None:
    clock = StepClock()
    begin = time.perf_counter()
    with clock.waiting():
        time.sleep(0.01)
    with clock.paused("judging"):
        time.sleep(0.02)
    with clock.paused("saving"):
        time.sleep(0.03)
    lap = clock.lap()
    whole = lap.train_s + lap.judge_s + lap.save_s
    assert whole == pytest.approx(time.perf_counter() - begin, abs=0.005)
    assert lap.wait_s >= 0.01
    assert lap.judge_s >= 0.02
    assert lap.save_s >= 0.03
    assert lap.train_s >= lap.wait_s
    after = clock.lap()
    assert (after.wait_s, after.judge_s, after.save_s) == (0, 0, 0)


def test_times_of_several_processes_add_up() -> None:
    before = add_times({}, Lap(3, 0, 2, 0), starting=True)
    assert before == {"start_up": 3, "judging": 2, "saving": 0}
    assert add_times(before, Lap(1, 0, 4, 5), starting=False) == {"start_up": 3, "judging": 6, "saving": 5}
