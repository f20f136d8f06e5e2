"""patchify_gather: the pixels of the kept patches, normalised, as rows for one GEMM.

    out[b, k] = ((image patch index[b, k]) / 255 - mean) / std, flattened as [C, p, p]

Bytes that must move: the kept pixels once in (one byte each for uint8) and once out. Patches
that are masked away are never read, and no normalised image is ever written.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from fastjepa_kernels.checks import (
    FLOAT_DTYPES,
    require,
    require_cu_seqlens,
    require_index,
    require_same_device,
    shape_of,
)
from fastjepa_kernels.sequences import rows_in_sequences, sequence_of_rows

Channels = Sequence[float] | Tensor | None


def _reference(
    images: Tensor,
    index: Tensor | None,
    patch_size: int,
    mean: Channels,
    std: Channels,
    dtype: torch.dtype,
    cu_seqlens: Tensor | None,
) -> Tensor:
    batch, channels, height, width = images.shape
    rows, columns = height // patch_size, width // patch_size
    grid = images.unflatten(2, (rows, patch_size)).unflatten(4, (columns, patch_size))
    grid = grid.permute(0, 2, 4, 1, 3, 5)  # [B, rows, columns, C, p, p], a view
    if index is None:
        patches = grid.flatten(1, 2)  # [B, N, C, p, p]
    else:
        index = index.long()
        if cu_seqlens is None:
            image = torch.arange(batch, device=images.device)[:, None]  # [B, 1]
        else:
            image = sequence_of_rows(cu_seqlens, index.numel())  # [T]
        row = index.div(columns, rounding_mode="floor")
        patches = grid[image, row, index - row * columns]  # [B, K, C, p, p] or [T, C, p, p]

    work = torch.float64 if torch.float64 in (dtype, images.dtype) else torch.float32
    # (v / 255 - mean) / std is v * scale + shift; these are rounded once.
    divisor = _per_channel(std, 1.0, images)
    scale = 1 / divisor if images.is_floating_point() else 1 / (255 * divisor)
    shift = -_per_channel(mean, 0.0, images) / divisor
    values = patches.to(work) * scale.to(work) + shift.to(work)
    if cu_seqlens is not None:
        values = torch.where(rows_in_sequences(cu_seqlens, len(values))[:, None, None, None], values, 0)
    return values.to(dtype).flatten(-3)


def _per_channel(values: Channels, default: float, images: Tensor) -> Tensor:
    """float64 [C, 1, 1] on the device of `images`."""
    given = torch.as_tensor([default] * images.shape[1] if values is None else values, dtype=torch.float64)
    # A blocking copy of a handful of numbers would wait for all the work queued on the device.
    return given.to(images.device, non_blocking=True)[:, None, None]


@torch.no_grad()
def patchify_gather(
    images: Tensor,
    index: Tensor | None,
    patch_size: int,
    mean: Channels = None,
    std: Channels = None,
    dtype: torch.dtype = torch.float32,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """Normalise and unfold the patches that `index` names; the others are not read.

    Args:
        images: [B, C, H, W] uint8 (divided by 255) or floating point, of any strides.
        index: [B, K] of any integer type; packed [T] with `cu_seqlens`; None for all patches.
            Patches are counted row by row.
        patch_size: p; H and W must be multiples of it.
        mean, std: per channel, in units of the (divided) pixel; None for 0 and 1.
        dtype: of the result.
        cu_seqlens: int32 [B + 1], where each image's part of a packed `index` starts.

    Returns:
        [B, K, C * p * p], or [T, C * p * p] if packed (zero past cu_seqlens[-1]), in the order of a Conv2d
        weight. No gradient.

    Raises:
        ValueError: on a wrong shape, dtype or device; on the CPU also for an index out of range.
    """
    require(images.ndim == 4, f"images must be [B, C, H, W], got {shape_of(images)}")
    require(
        images.dtype == torch.uint8 or images.dtype in FLOAT_DTYPES,
        f"images must be uint8 or floating point, got {shape_of(images)}",
    )
    require(dtype in FLOAT_DTYPES, f"dtype must be floating point, got {dtype}")
    batch, channels, height, width = images.shape
    require(
        patch_size > 0 and height % patch_size == 0 and width % patch_size == 0,
        f"patch_size must divide the image, got {patch_size} for {height} x {width} pixels",
    )
    for name, values in (("mean", mean), ("std", std)):
        require(
            values is None or len(values) == channels,
            f"{name} must have one value for each of {channels} channels",
        )
    require_same_device(images=images, index=index, cu_seqlens=cu_seqlens)
    require(cu_seqlens is None or index is not None, "cu_seqlens needs a packed index [T]")
    if index is not None:
        require_index("index", index, (height // patch_size) * (width // patch_size))
        if cu_seqlens is None:
            require(
                index.ndim == 2 and index.shape[0] == batch,
                f"index must be [B, K] with B = {batch}, got {shape_of(index)}",
            )
        else:
            require(index.ndim == 1, f"with cu_seqlens, index must be [T], got {shape_of(index)}")
            require_cu_seqlens(cu_seqlens, index.numel())
            require(
                cu_seqlens.numel() == batch + 1,
                f"cu_seqlens must have B + 1 = {batch + 1} entries, got {cu_seqlens.numel()}",
            )
    return _reference(images, index, patch_size, mean, std, dtype, cu_seqlens)
