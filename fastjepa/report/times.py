"""Where the time of a run went, from its rows and its summary."""

import math
from dataclasses import dataclass
from itertools import pairwise

from fastjepa.report.load import Run


@dataclass(frozen=True)
class Part:
    """One use of time; `seconds` over all processes that the run took."""

    name: str
    seconds: float
    colour: str  # the name of a CSS variable


def times(run: Run) -> list[Part]:
    """Training, waiting for data, judging, saving and starting up; a run that did not note one leaves it out.

    Time whose rows are gone, as a run that was killed resumes before them, is in none of them.
    """
    rows = [row for row in run.metrics if math.isfinite(row.get("elapsed_s", math.nan))]
    if not rows:
        return []
    elapsed_s = [0.0, *(row["elapsed_s"] for row in rows)]
    laps_s = [max(0.0, after - before) for before, after in pairwise(elapsed_s)]
    wait_s = sum(row.get("data_wait_fraction", 0.0) * lap for row, lap in zip(rows, laps_s, strict=True))
    parts = [
        Part("training", elapsed_s[-1] - wait_s, "blue"),
        Part("waiting for data", wait_s, "red"),
    ]
    ends = run.summary.spent_s
    if ends or any("judge_s" in row for row in rows):
        judge_s = ends.get("judging", 0.0) + sum(row.get("judge_s", 0.0) for row in run.metrics)
        save_s = ends.get("saving", 0.0) + sum(row.get("save_s", 0.0) for row in run.metrics)
        parts += [Part("judging", judge_s, "green"), Part("saving", save_s, "orange")]
    if "start_up" in ends:
        parts.append(Part("starting up", ends["start_up"], "grey"))
    return parts
