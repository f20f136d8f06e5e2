"""Detail that cannot be predicted, added to images: a fixed function of (seed, image number).

Whatever is added is drawn from a counter that sees the number of the image and nothing else, neither its
pixels nor its label, so it tells nothing about the class. Strength 0 gives the image itself, 1 the most:

    noise        (1 - a) image + a noise with a = .8 s: every pixel of it uniform and independent
    texture      s texture behind the garment, seen where the image is black; all contrast at 1
    distractor   another garment, somewhere, of another size, pasted over with opacity s
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from fastjepa.masks.counter import Stream, below, random_words, uniform

Kind = Literal["noise", "texture", "distractor"]
KINDS: tuple[Kind, ...] = get_args(Kind)

MOST_NOISE = 0.8  # of a mixture; a fifth of the image is left
SOLID = 64  # grey levels from which on a pixel is all garment; darker ones let through what is behind
CELLS = (4, 7, 14)  # of a texture, along a side: blots from 7 down to 2 pixels wide
SCALES = (0.4, 0.8)  # of a distractor
REACH = 0.8  # of its centre, from the middle of the image (0) to the border (1)


@dataclass(frozen=True)
class Draws:
    """The random numbers of some images."""

    seed: int
    numbers: Tensor  # int64 [n]

    def words(self, count: int, purpose: int = 0) -> Tensor:
        """int64 [n, count] in [0, 2**32)."""
        return random_words(self.seed, Stream.CROP, self.numbers, 0, count, attempt=purpose)

    def levels(self, count: int, purpose: int = 0) -> Tensor:
        """fp32 [n, count] of whole numbers in [0, 255], four from each word."""
        words = self.words(-(-count // 4), purpose)
        parts = torch.stack([(words >> shift) & 255 for shift in (0, 8, 16, 24)], dim=-1)
        return parts.flatten(1)[:, :count].float()

    def uniform(self, count: int, purpose: int = 0) -> Tensor:
        """fp32 [n, count] in [0, 1]."""
        return uniform(self.seed, Stream.CROP, self.numbers, 0, count, attempt=purpose).float()


def corrupt(
    images: Tensor, numbers: Tensor, kind: str, strength: float, seed: int, donors: Tensor | None = None
) -> Tensor:
    """Images with detail added.

    Args:
        images: uint8 [n, 1, H, W].
        numbers: int64 [n], of the images; those below m are the donors of that number themselves.
        kind: one of KINDS.
        strength: 0 to 1.
        seed: of what is added.
        donors: uint8 [m, 1, H, W], m at least 2: the garments that distractors are taken from.

    Returns:
        uint8 [n, 1, H, W], on the device of `images`.

    Raises:
        ValueError: another kind, or a strength outside 0 to 1.
    """
    if kind not in KINDS:
        raise ValueError(f"the kind of detail must be one of {', '.join(KINDS)}, got {kind!r}")
    if not 0 <= strength <= 1:
        raise ValueError(f"the strength must lie between 0 and 1, got {strength}")
    # The numbers of training come from seeds near 0. These are far away, and of each kind its own.
    draws = Draws(seed + ((1 + KINDS.index(kind)) << 48), numbers)
    mixed = _WAYS[kind](images.float(), draws, strength, images if donors is None else donors)
    return mixed.round_().clamp_(0, 255).to(torch.uint8)


def _noise(images: Tensor, draws: Draws, strength: float, _donors: Tensor) -> Tensor:
    noise = draws.levels(images[0].numel()).view_as(images)
    return images.lerp(noise, MOST_NOISE * strength)


def _texture(images: Tensor, draws: Draws, strength: float, _donors: Tensor) -> Tensor:
    chosen = below(draws.words(1, purpose=0), len(CELLS))[:, :, None, None]  # [n, 1, 1, 1]
    texture = torch.zeros_like(images)
    for which, cells in enumerate(CELLS):
        levels = draws.levels(cells * cells, purpose=1 + which).view(-1, 1, cells, cells)
        blots = F.interpolate(levels, images.shape[2:], mode="bilinear", align_corners=False)
        texture = torch.where(chosen == which, blots, texture)
    return images + (1 - _matte(images)) * strength * texture


def _distractor(images: Tensor, draws: Draws, strength: float, donors: Tensor) -> Tensor:
    itself = draws.numbers < len(donors)  # [n]
    donor = below(draws.words(1, purpose=0)[:, 0], len(donors) - itself.long())
    donor = donor + (itself & (donor >= draws.numbers))  # never the image itself
    size, across, down = draws.uniform(3, purpose=1).unbind(1)  # [n] each
    scale = SCALES[0] + (SCALES[1] - SCALES[0]) * size
    across, down = REACH * (2 * across - 1), REACH * (2 * down - 1)
    zero = torch.zeros_like(scale)
    rows = [
        torch.stack([1 / scale, zero, -across / scale], 1),
        torch.stack([zero, 1 / scale, -down / scale], 1),
    ]
    grid = F.affine_grid(torch.stack(rows, 1), list(images.shape), align_corners=False)  # [n, H, W, 2]
    other = F.grid_sample(donors[donor].float(), grid, align_corners=False)
    return images.lerp(other, strength * _matte(other))


def _matte(images: Tensor) -> Tensor:
    """How far a pixel is garment: 0 for black to 1."""
    return (images / SOLID).clamp(max=1)


_WAYS: dict[str, Callable[[Tensor, Draws, float, Tensor], Tensor]] = {
    "noise": _noise,
    "texture": _texture,
    "distractor": _distractor,
}
