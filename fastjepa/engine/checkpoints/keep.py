"""Which checkpoints stay: the newest few for ever newer ones, and some for ever."""

import shutil
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from fastjepa.engine.checkpoints.checkpoint import list_checkpoints, step_of


@dataclass(frozen=True)
class Keep:
    """What stays.

    Attributes:
        last: so many of the newest, at least 1.
        every: those of steps that this divides stay for ever; None for none.
    """

    last: int
    every: int | None = None

    def reasons(self, steps: Iterable[int]) -> dict[int, str]:
        """Why each step that stays does so."""
        newest_first = sorted(steps, reverse=True)
        why = {step: f"every {self.every}" for step in newest_first if self.every and step % self.every == 0}
        for place, step in enumerate(newest_first[: self.last], start=1):
            why[step] = "newest" if place == 1 else f"one of the last {self.last}"
        return why


def superfluous(directory: Path, newest_good: int, keep: Keep) -> list[Path]:
    """Checkpoints that need not stay, newest first.

    Args:
        directory: of checkpoints.
        newest_good: a step. Later ones are damaged: they neither count nor go.
        keep: what stays.
    """
    present = [path for path in list_checkpoints(directory) if step_of(path) <= newest_good]
    stay = keep.reasons(map(step_of, present))
    return [path for path in present if step_of(path) not in stay]


def prune(directory: Path, newest_good: int, keep: Keep) -> None:
    """Delete what `superfluous` finds; what cannot be deleted stays."""
    for path in superfluous(directory, newest_good, keep):
        with suppress(OSError):
            shutil.rmtree(set_aside(path), ignore_errors=True)


def set_aside(path: Path) -> Path:
    """Give what is about to be deleted another name: a kill half-way leaves no damaged checkpoint."""
    going = path.with_suffix(".tmp")
    return going if going == path else path.rename(going)
