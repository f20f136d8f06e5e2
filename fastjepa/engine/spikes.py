"""Loss spikes: several losses in a row far above what was usual, seen in the losses alone.

A spike is not a noisy step, of which there are some in every run, nor a slow rise, which a JEPA's loss has
wherever its target has more to say. What was usual is the median of the losses before, and how far they
strayed is the median of their distances from it (MAD), since neither minds a few odd ones.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

# The constants are held against recorded curves in tests/engine/test_spikes.py.
WINDOW = 64  # losses that say what is usual; with fewer there is no telling
IN_A_ROW = 4  # losses that a spike takes
MADS = 6.0  # above the median: of normal noise 4 standard deviations
RISE = 0.3  # and by this part of the median, where noise is small
KEPT = WINDOW + IN_A_ROW  # losses that later ones are judged with


@dataclass(frozen=True)
class Spike:
    """Where the loss rose.

    Attributes:
        step: the first that is too high, counted from 1.
        loss: the highest of the first few.
        usual: the median of the losses before.
    """

    step: int
    loss: float
    usual: float

    def __str__(self) -> str:
        return f"the loss rose from {self.usual:.4g} to {self.loss:.4g} at step {self.step}"


def find_spike(losses: Sequence[float], last_step: int, told: int = 0) -> Spike | None:
    """The first spike, as soon as `IN_A_ROW` losses show it.

    Args:
        losses: of consecutive steps; those that are no number are passed over, as steps that were skipped.
        last_step: the step of the last of them, counted from 1.
        told: the step of the last spike known, 0 for none; what rises within a window of it is the same one.
    """
    first = last_step - len(losses) + 1
    begin = max(WINDOW, told + WINDOW + 1 - first if told else 0)
    for i in range(begin, len(losses) - IN_A_ROW + 1):
        before, risen = losses[i - WINDOW : i], losses[i : i + IN_A_ROW]
        limit = highest_usual(before)
        if all(loss > limit for loss in risen):
            return Spike(first + i, max(risen), median(filter(math.isfinite, before)))
    return None


def highest_usual(losses: Sequence[float]) -> float:
    """What a loss after these may be; infinity if half of them or more are no numbers."""
    finite = [loss for loss in losses if math.isfinite(loss)]
    if 2 * len(finite) <= len(losses):
        return math.inf
    middle = median(finite)
    strayed = median(abs(loss - middle) for loss in finite)
    return middle + max(MADS * strayed, RISE * abs(middle))


def seen_within(log_every: int) -> int:
    """So many steps after a checkpoint that is old enough to be gone back to, every spike has been seen.

    Losses are looked at with each log line. A spike that shows there may have begun up to `IN_A_ROW` steps
    before the line before, and what is within `IN_A_ROW` steps of its first is not gone back into.
    """
    return log_every + 2 * IN_A_ROW


def may_roll_back(spike: Spike, rolled_back: int, save_every: int) -> bool:
    """Whether a spike is far enough from the last one that data were passed over for.

    One in the same place is not the data's doing, and with one soon after a run would go back all the time.

    Args:
        spike: now.
        rolled_back: the step of that spike; 0 if there was none.
        save_every: steps between checkpoints.
    """
    return not rolled_back or spike.step > rolled_back + max(save_every, WINDOW)
