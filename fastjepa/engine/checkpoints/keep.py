"""Which checkpoints stay: the newest few for ever newer ones, and some for ever."""

import shutil
from collections.abc import Collection, Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from fastjepa.engine.checkpoints.checkpoint import is_of_other_version, list_checkpoints, step_of


@dataclass(frozen=True)
class Keep:
    """What stays.

    Attributes:
        last: so many of the newest, at least 1.
        every: the first at or after each multiple of so many steps stays for ever; None for none.
        back: for a run that may have to go back, so do those less than so many steps older than the newest,
            for now, and the one before them; None for none.
    """

    last: int
    every: int | None = None
    back: int | None = None

    def reasons(self, steps: Iterable[int]) -> dict[int, str]:
        """Why each step that stays does so."""
        newest_first = sorted(steps, reverse=True)
        why: dict[int, str] = {}
        if self.every:
            first = {step // self.every: step for step in newest_first if step >= self.every}
            why = dict.fromkeys(first.values(), f"every {self.every}")
        if self.back is not None:
            young = sum(step > newest_first[0] - self.back for step in newest_first)
            why |= dict.fromkeys(newest_first[: young + 1], "to go back to")
        for place, step in enumerate(newest_first[: self.last], start=1):
            why[step] = "newest" if place == 1 else f"one of the last {self.last}"
        return why

    def reprieves(self, step: int, oldest: int) -> bool:
        """Whether a damaged one stays: newer than the oldest of the last, or for ever."""
        return step > oldest or bool(self.every and step % self.every == 0)


def superfluous(
    directory: Path, newest_good: int, keep: Keep, damaged: Collection[Path] = frozenset()
) -> list[Path]:
    """Checkpoints that need not stay, newest first.

    Args:
        directory: of checkpoints.
        newest_good: a step. Later ones are damaged: they neither count nor go.
        keep: what stays.
        damaged: those known to be. They do not count either, and go no sooner than a good one would.
    """
    present = [path for path in list_checkpoints(directory) if step_of(path) <= newest_good]
    good = [step_of(path) for path in present if path not in damaged or step_of(path) == newest_good]
    stay = keep.reasons(good)
    last = good[: keep.last]
    oldest = last[-1] if len(last) == keep.last else 0
    return [
        path
        for path in present
        if step_of(path) not in stay and not (path in damaged and keep.reprieves(step_of(path), oldest))
    ]


def prune(directory: Path, newest_good: int, keep: Keep, damaged: Collection[Path] = frozenset()) -> None:
    """Delete what `superfluous` finds; what cannot be deleted, or is of another version, stays."""
    for path in superfluous(directory, newest_good, keep, damaged):
        with suppress(OSError):
            if not is_of_other_version(path):
                shutil.rmtree(set_aside(path), ignore_errors=True)


def set_aside(path: Path) -> Path:
    """Give what is about to be deleted another name: a kill half-way leaves no damaged checkpoint."""
    going = path.with_suffix(".tmp")
    return going if going == path else path.rename(going)


def put_away(path: Path) -> Path:
    """Give what nobody may delete another name, under which it is no checkpoint: step_N.aside, or .aside2."""
    number, aside = 1, path.with_suffix(".aside")
    while aside.exists():
        number += 1
        aside = path.with_suffix(f".aside{number}")
    return path.rename(aside)
