"""gather_tokens: rows of a batch of token grids, each image by its own index list.

    out[b, k] = x[b, index[b, k]] (+ pos[index[b, k]])

Bytes that must move: T rows read and T rows written (twice `T * D * element_size`), and the
index once. The way usually seen expands the index to [B, K, D] int64 and moves five times that.
"""

import torch
from torch import Tensor

from fastjepa_kernels.checks import (
    FLOAT_DTYPES,
    require,
    require_cu_seqlens,
    require_float,
    require_index,
    require_same_device,
    shape_of,
)
from fastjepa_kernels.sequences import rows_in_sequences, sequence_of_rows


def _reference(
    x: Tensor, index: Tensor, pos: Tensor | None, cu_seqlens: Tensor | None, dtype: torch.dtype
) -> Tensor:
    batch, grid, width = x.shape
    index = index.long()
    if cu_seqlens is None:
        image = torch.arange(batch, device=x.device)[:, None]  # [B, 1]
    else:
        image = sequence_of_rows(cu_seqlens, index.numel())  # [T]
    rows = image * grid + index  # [B, K] or [T]
    tokens = x.reshape(batch * grid, width).index_select(0, rows.flatten())
    if pos is not None:
        tokens = tokens + pos.index_select(0, index.flatten())
    if cu_seqlens is not None:
        tokens = torch.where(rows_in_sequences(cu_seqlens, index.numel())[:, None], tokens, 0)
    return tokens.to(dtype).view(*index.shape, width)


def gather_tokens(
    x: Tensor,
    index: Tensor,
    pos: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Take the rows of `x` that `index` names, image by image.

    Args:
        x: [B, N, D] floating point.
        index: [B, K] of any integer type, or packed [T] with `cu_seqlens`. Per image, in 0..N-1;
            may repeat.
        pos: [N, D], rows added to the tokens taken.
        cu_seqlens: int32 [B + 1]: tokens cu_seqlens[b] to cu_seqlens[b + 1] of `index` are of image b.
        dtype: of the result; that of `x` by default.

    Returns:
        [B, K, D], or [T, D] if packed, zero past cu_seqlens[-1]. Differentiable in `x`, and in `pos` if
        it asks.

    Raises:
        ValueError: on a wrong shape, dtype or device; on the CPU also for an index out of range.
    """
    require(x.ndim == 3, f"x must be [B, N, D], got {shape_of(x)}")
    require_float("x", x)
    require_same_device(x=x, index=index, pos=pos, cu_seqlens=cu_seqlens)
    require_index("index", index, x.shape[1])
    if cu_seqlens is None:
        require(
            index.ndim == 2 and index.shape[0] == x.shape[0],
            f"index must be [B, K] with B = {x.shape[0]}, got {shape_of(index)}",
        )
    else:
        require(index.ndim == 1, f"with cu_seqlens, index must be [T], got {shape_of(index)}")
        require_cu_seqlens(cu_seqlens, index.numel())
        require(
            cu_seqlens.numel() == x.shape[0] + 1,
            f"cu_seqlens must have B + 1 = {x.shape[0] + 1} entries, got {cu_seqlens.numel()}",
        )
    if pos is not None:
        require_float("pos", pos)
        require(pos.shape == x.shape[1:], f"pos must be [N, D] = {list(x.shape[1:])}, got {shape_of(pos)}")
    require(dtype is None or dtype in FLOAT_DTYPES, f"dtype must be floating point, got {dtype}")
    return _reference(x, index, pos, cu_seqlens, dtype or x.dtype)
