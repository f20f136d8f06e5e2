import math

import pytest

from fastjepa.report.load import Metrics, Run, Summary
from fastjepa.report.times import times

ROWS: Metrics = [
    {"step": 1, "elapsed_s": 1.0, "data_wait_fraction": 0.5, "judge_s": 0.0, "save_s": 0.0},
    {"step": 10, "elapsed_s": 11.0, "data_wait_fraction": 0.1, "judge_s": 3.0, "save_s": 0.5},
    {"step": 10, "spike_loss": 3.0},
]


def seconds(rows: Metrics, spent_s: dict[str, float]) -> dict[str, float]:
    run = Run("", rows, Summary("run", spent_s=spent_s), [], [])
    return {part.name: part.seconds for part in times(run)}


def test_rows_and_summary_add_up() -> None:
    assert seconds(ROWS, {"start_up": 2, "judging": 4, "saving": 1}) == pytest.approx(
        {"training": 9.5, "waiting for data": 1.5, "judging": 7, "saving": 1.5, "starting up": 2}
    )


def test_what_an_older_run_did_not_note_is_left_out() -> None:
    rows: Metrics = [{"step": 1, "elapsed_s": 4.0, "data_wait_fraction": 0.25}]
    assert seconds(rows, {}) == {"training": 3, "waiting for data": 1}
    assert seconds([{"step": 1, "elapsed_s": math.nan}], {}) == {}
