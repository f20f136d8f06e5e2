"""Fixed two-dimensional sine-cosine positions."""

import numpy as np
import torch
from torch import Tensor


def sincos_1d(positions: np.ndarray, width: int) -> np.ndarray:
    """[sin, cos] of position * 10000^(-i / (width / 2)), in float64: [len(positions), width]."""
    frequencies = 10000.0 ** (-np.arange(width // 2, dtype=np.float64) / (width / 2))
    angles = positions.astype(np.float64)[:, None] * frequencies  # [n, width / 2]
    return np.concatenate([np.sin(angles), np.cos(angles)], axis=1)


def places_in(patches: int, trained: int) -> np.ndarray:
    """Where the centres of `patches` lie on a side that `trained` patches once covered, in units of those.

    Place j is (j + 1/2) * trained / patches - 1/2: float64 [patches], and 0, 1, 2, … for the same number.
    """
    return (np.arange(patches, dtype=np.float64) + 0.5) * (trained / patches) - 0.5


def sincos_2d(
    grid: tuple[int, int],
    width: int,
    class_token: bool = False,
    trained_grid: tuple[int, int] | None = None,
) -> Tensor:
    """The position table of a grid, as published with MAE and I-JEPA.

    The first half of the channels encodes the column, the second half the row.

    Args:
        grid: patches per column and per row.
        width: of a token.
        class_token: put a row of zeros before the others.
        trained_grid: of an encoder that is to see images on `grid` as if they were of its own size. Its sines
            are computed between its patches (`places_in`), exactly, where a table would be interpolated.

    Returns:
        fp32 [1, rows * columns, width], row by row; with `class_token` a row more.

    Raises:
        ValueError: if `width` is no multiple of 4.
    """
    if width % 4:
        raise ValueError(f"sine-cosine positions need a width that is a multiple of 4, got {width}")
    rows, columns = (places_in(*sides) for sides in zip(grid, trained_grid or grid, strict=True))
    across, down = np.tile(columns, grid[0]), np.repeat(rows, grid[1])  # [N] each
    table = np.concatenate([sincos_1d(across, width // 2), sincos_1d(down, width // 2)], axis=1)
    if class_token:
        table = np.concatenate([np.zeros((1, width)), table])
    return torch.from_numpy(table).float()[None]  # [1, N, D]
