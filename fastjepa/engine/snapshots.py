"""Which pictures of the features stay in report/snapshots: the first, the last, and a few in between."""

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

MOST = 8  # of 8 images each: 1 MB at ViT-Ti/4 of 28 pixels, 20 MB at ViT-B/16, 50 MB at ViT-g/14


def thinned(steps: Sequence[int], most: int = MOST) -> list[int]:
    """Steps to keep: never without the first and the last, the others about as far apart as factors.

    Features change fastest at the start, so that even distances would show a long run as start and end.
    Called after each new step it needs no plan of how long the run will be.

    Args:
        steps: ascending and not negative.
        most: at least 2.
    """
    kept = list(steps)
    while len(kept) > most:
        # The one whose neighbours are closest, as factors. After step 0 comes an infinite one.
        around = zip(kept, kept[2:], strict=False)
        gaps = [after / before if before else float("inf") for before, after in around]
        del kept[1 + gaps.index(min(gaps))]
    return kept


def thin(folder: Path, most: int = MOST) -> None:
    """Delete snapshots that there are too many of; one that cannot be deleted stays."""
    found = _by_step(folder)
    for step in found.keys() - set(thinned(sorted(found), most)):
        with suppress(OSError):
            found[step].unlink()


def cut_after(folder: Path, step: int) -> None:
    """Delete the snapshots past `step`, which come again, and what a killed process left half written."""
    for path in [*(path for at, path in _by_step(folder).items() if at > step), *folder.glob("step_*.tmp")]:
        with suppress(OSError):
            path.unlink()


def _by_step(folder: Path) -> dict[int, Path]:
    paths = folder.glob("step_*.safetensors")
    return {int(path.stem[5:]): path for path in paths if path.stem[5:].isdecimal()}
