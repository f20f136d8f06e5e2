"""How large the blocks of a multi-block mask are: pure arithmetic on the host."""

import itertools
import math
from dataclasses import dataclass

Range = tuple[float, float]


@dataclass(frozen=True)
class BlockShape:
    """Rows and columns of patches."""

    height: int
    width: int

    @property
    def area(self) -> int:
        return self.height * self.width


def block_shape(
    grid: tuple[int, int], scale: Range, aspect: Range, r_scale: float, r_aspect: float, *, below_side: bool
) -> BlockShape:
    """The block that a draw r in [0, 1) of scale and of aspect gives (arXiv:2301.08243, section 4).

    Args:
        grid: rows and columns of patches.
        scale: range of the fraction of the grid that a block covers.
        aspect: range of height / width.
        r_scale, r_aspect: where in these ranges; the published sampler uses one number for both.
        below_side: lower each side until it is smaller than the grid's, as published; otherwise a
            block may be as large as the grid.
    """
    area = int(grid[0] * grid[1] * _within(scale, r_scale))
    return _block_of(grid, area, _within(aspect, r_aspect), below_side=below_side)


def _block_of(grid: tuple[int, int], area: int, ratio: float, *, below_side: bool) -> BlockShape:
    height, width = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
    return BlockShape(min(height, grid[0] - below_side), min(width, grid[1] - below_side))


def _within(bounds: Range, r: float) -> float:
    low, high = bounds
    return low + r * (high - low)


def smallest_area(grid: tuple[int, int], scale: Range, aspect: Range, *, below_side: bool) -> int:
    """The fewest patches that a block can have over all draws of scale and aspect; 0 if it can be empty.

    Exact: between the ratios at which a side's rounding turns, the shape does not change.
    """
    patches = grid[0] * grid[1]
    smallest = patches
    for area in range(max(1, int(patches * scale[0])), int(patches * scale[1]) + 1):
        halves = [(k + 0.5) ** 2 for k in range(math.isqrt(patches) + max(grid) + 1)]
        turns = [square / area for square in halves] + [area / square for square in halves]
        cuts = sorted([*aspect, *(turn for turn in turns if aspect[0] < turn < aspect[1])])
        between = [(low + high) / 2 for low, high in itertools.pairwise(cuts)]
        for ratio in [*cuts, *between]:
            shape = _block_of(grid, area, ratio, below_side=below_side)
            smallest = min(smallest, max(0, shape.area))
    return 0 if int(patches * scale[0]) == 0 else smallest
