"""Whether a run is still going, and how far it is."""

import fcntl
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Literal

from fastjepa.report.load import Metrics, Run

State = Literal["going", "ended", "stopped", "broken off"]

_RECENT_ROWS = 10  # whose median speed says how long it will take still
_RECENT_S = 900  # where a drive has no locks, a run that wrote this lately is taken for one that is going


@dataclass(frozen=True)
class Status:
    """Attributes:
    state: "stopped" was told to, "broken off" was not.
    step: of the newest row; 0 before there is one.
    planned: steps of the whole run; None where the summary does not say.
    left_s: what training will still take at the speed of late, without judging and saving; None unless going.
    """

    state: State
    step: int
    planned: int | None
    left_s: float | None

    @property
    def is_live(self) -> bool:
        return self.state == "going"


def status_of(run_dir: Path, run: Run) -> Status:
    """What the summary, the last row and the lock that a training process holds say together."""
    step = int(run.metrics[-1]["step"]) if run.metrics else 0
    planned = run.summary.planned_steps
    # The summary counts steps once a run has ended; one that has since been taken up again has gone on.
    concluded = run.summary.steps or 0
    if concluded and concluded >= max(step, planned or 0):
        return Status("ended", concluded, planned, None)
    if is_held(run_dir):
        return Status("going", step, planned, _left_s(run.metrics, planned))
    return Status("stopped" if (run_dir / "stopped").exists() else "broken off", step, planned, None)


def is_held(run_dir: Path) -> bool:
    """Whether a process trains there. It holds the lock to its end, however it ends."""
    try:
        with (run_dir / ".lock").open() as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except FileNotFoundError:
        return False
    except OSError:
        try:
            return time.time() - (run_dir / "metrics.jsonl").stat().st_mtime < _RECENT_S
        except OSError:
            return False
    return False


def _left_s(metrics: Metrics, planned: int | None) -> float | None:
    speeds = [row["images_per_second"] for row in metrics if row.get("images_per_second", 0) > 0]
    last = metrics[-1] if metrics else {}
    if planned is None or not speeds or not last.get("images") or not last["step"]:
        return None
    images_per_step = last["images"] / last["step"]
    return max(0.0, planned - last["step"]) * images_per_step / median(speeds[-_RECENT_ROWS:])
