"""Fixed two-dimensional sine-cosine positions."""

import numpy as np
import torch
from torch import Tensor


def sincos_1d(positions: np.ndarray, width: int) -> np.ndarray:
    """[sin, cos] of position * 10000^(-i / (width / 2)), in float64: [len(positions), width]."""
    frequencies = 10000.0 ** (-np.arange(width // 2, dtype=np.float64) / (width / 2))
    angles = positions.astype(np.float64)[:, None] * frequencies  # [n, width / 2]
    return np.concatenate([np.sin(angles), np.cos(angles)], axis=1)


def sincos_2d(grid: tuple[int, int], width: int, class_token: bool = False) -> Tensor:
    """The position table of a grid, as published with MAE and I-JEPA.

    The first half of the channels encodes the column, the second half the row.

    Returns:
        fp32 [1, rows * columns, width], row by row; with `class_token` a row of zeros before them.

    Raises:
        ValueError: if `width` is no multiple of 4.
    """
    if width % 4:
        raise ValueError(f"sine-cosine positions need a width that is a multiple of 4, got {width}")
    row, column = np.divmod(np.arange(grid[0] * grid[1]), grid[1])
    table = np.concatenate([sincos_1d(column, width // 2), sincos_1d(row, width // 2)], axis=1)
    if class_token:
        table = np.concatenate([np.zeros((1, width)), table])
    return torch.from_numpy(table).float()[None]  # [1, N, D]
