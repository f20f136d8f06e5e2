"""Images that cannot be read: a few are skipped and named, many stop the run."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

_log = logging.getLogger(__name__)

MAX_BAD_FRACTION = 0.05
_ALWAYS_TOLERATED = 2
_FEWEST_TRIED = 200  # the usual 5 % of fewer is so few that a healthy set exceeds it by bad luck


class UnreadableImage(Exception):
    """The file at `path` gives no pixels, for `reason`."""

    def __init__(self, path: str, reason: str) -> None:
        super().__init__(path, reason)
        self.path = path
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.path}: {self.reason}"


class TooManyUnreadable(RuntimeError):
    """More images cannot be read than a run may skip."""


def tolerated(tried: int, images: int, max_bad_fraction: float = MAX_BAD_FRACTION) -> int:
    """How many unreadable images a run skips.

    A fraction of the images tried, taken as at least 200 (or all, where there are fewer), and never
    fewer than 2, unless the fraction is 0.

    Args:
        tried: distinct images tried so far.
        images: images in the set.
        max_bad_fraction: the fraction; 0 skips none.
    """
    if not max_bad_fraction:
        return 0
    return max(_ALWAYS_TOLERATED, int(max_bad_fraction * max(tried, min(images, _FEWEST_TRIED))))


def too_many(
    reasons: Mapping[str, str], tried: int, max_bad_fraction: float = MAX_BAD_FRACTION
) -> TooManyUnreadable:
    """The error to raise, naming the count and the first few of `reasons` (path -> reason)."""
    first = "".join(f"\n  {path}: {reason}" for path, reason in list(reasons.items())[:5])
    return TooManyUnreadable(
        f"{len(reasons)} of {tried} images cannot be read; at most {100 * max_bad_fraction:.3g}% are "
        f"skipped. Repair or remove them. The first:{first}"
    )


@dataclass
class UnreadableCounter:
    """Warns once of each unreadable image, and stops the run when there are too many.

    Attributes:
        images: images in the set.
        max_bad_fraction: of those tried, how many may be unreadable; see `tolerated`.
        reasons: path -> reason, of every unreadable image so far.
    """

    images: int
    max_bad_fraction: float = MAX_BAD_FRACTION
    reasons: dict[str, str] = field(default_factory=dict)
    _read: Tensor = field(init=False, repr=False)  # bool [images]: read at least once

    def __post_init__(self) -> None:
        self._read = torch.zeros(self.images, dtype=torch.bool)

    def update(self, image_index: Tensor, unreadable: Mapping[str, str]) -> None:
        """Count a batch.

        Args:
            image_index: int64 [B], the images that were read.
            unreadable: path -> reason of those that were not.

        Raises:
            TooManyUnreadable: more than `tolerated` so far.
        """
        self._read[image_index] = True
        new = {path: reason for path, reason in unreadable.items() if path not in self.reasons}
        if not new:
            return
        for path, reason in new.items():
            _log.warning("skipped %s: %s", path, reason)
        self.reasons |= new
        tried = int(self._read.sum()) + len(self.reasons)
        if len(self.reasons) > tolerated(tried, self.images, self.max_bad_fraction):
            raise too_many(self.reasons, tried, self.max_bad_fraction)
