"""patchify_gather: the pixels of the kept patches, normalised, as rows for one GEMM.

    out[b, k] = ((image patch index[b, k]) / 255 - mean) / std, flattened as [C, p, p]

Bytes that must move: the kept pixels once in (one byte each for uint8) and once out. Patches
that are masked away are never read, and no normalised image is ever written.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from fastjepa_kernels import choice
from fastjepa_kernels.checks import (
    FLOAT_DTYPES,
    require,
    require_cu_seqlens,
    require_cu_seqlens_values,
    require_index,
    require_index_values,
    require_same_device,
    shape_of,
)
from fastjepa_kernels.choice import Way, Ways
from fastjepa_kernels.language import tl, triton
from fastjepa_kernels.ops import op
from fastjepa_kernels.sequences import image_of_row, rows_in_sequences, sequence_of_rows

Channels = Sequence[float] | Tensor | None


def _shape(images: Tensor, index: Tensor | None, patch_size: int) -> tuple[int, ...]:
    """Of the result: [B, K, C * p * p], or [T, C * p * p] if packed."""
    batch, channels, height, width = images.shape
    patches = (height // patch_size) * (width // patch_size)
    return *((batch, patches) if index is None else index.shape), channels * patch_size**2


# ------------------------------------------------------------------------------------- plain torch


def _reference(
    images: Tensor,
    index: Tensor | None,
    patch_size: int,
    mean: Tensor | None,
    std: Tensor | None,
    dtype: torch.dtype,
    cu_seqlens: Tensor | None,
) -> Tensor:
    batch, channels, _, width = images.shape
    columns = width // patch_size
    grid = images.unfold(2, patch_size, patch_size).unfold(3, patch_size, patch_size)
    grid = grid.permute(0, 2, 3, 1, 4, 5)  # [B, rows, columns, C, p, p], a view
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
    if std is None:
        scale = images.new_ones(channels, dtype=torch.float64)
    else:
        scale = std.double().reciprocal()  # [C]
    shift = None if mean is None else (-mean.double() * scale).to(work)
    scale = (scale if images.is_floating_point() else scale / 255).to(work)
    values = patches * scale[:, None, None]
    if shift is not None:
        values += shift[:, None, None]
    if cu_seqlens is not None:
        values = torch.where(rows_in_sequences(cu_seqlens, len(values))[:, None, None, None], values, 0)
    return values.to(dtype).flatten(-3)


# ------------------------------------------------------------------------------------------ Triton


# In packed training they are others at every step: one compiled kernel serves all of their values.
@triton.jit(do_not_specialize=["tokens", "kept"])
def _patchify_kernel(
    images,  # [B, C, H, W]
    index,  # [T] or None
    mean,  # [C] float64 or None
    std,  # [C] float64 or None
    cu_seqlens,  # [B + 1] or None
    out,  # [T, C, p, p]
    tokens,  # T
    kept,  # K; unused if packed
    batch,  # B
    channels,  # C
    patches,  # N
    columns,  # W / p
    image_stride,
    channel_stride,
    row_stride,
    column_stride,
    UNIT: tl.constexpr,  # what a pixel is multiplied with: 1 / 255 of bytes
    PATCH: tl.constexpr,
    SEARCH: tl.constexpr,
    ROWS: tl.constexpr,
    PIXELS: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    pixel = tl.program_id(1) * PIXELS + tl.arange(0, PIXELS)
    present = row < tokens
    if cu_seqlens is None:
        held = present
        image = row // kept
    else:
        held = present & (row < tl.load(cu_seqlens + batch))
        image = image_of_row(cu_seqlens, row, batch, SEARCH)
    if index is None:
        place = row - image * kept
    else:
        given = tl.load(index + row, mask=held, other=0).to(tl.int64)
        # Nothing outside of images is read, whatever the index says.
        held = held & (given >= 0) & (given < patches)
        place = given.to(tl.int32)
    patch_row = place // columns
    corner = image.to(tl.int64) * image_stride  # [ROWS]
    corner += (patch_row * PATCH).to(tl.int64) * row_stride
    corner += ((place - patch_row * columns) * PATCH).to(tl.int64) * column_stride
    within = (pixel // PATCH).to(tl.int64) * row_stride + (pixel % PATCH).to(tl.int64) * column_stride
    source = images + corner[:, None] + within[None, :]
    to = out + (row.to(tl.int64) * (channels * PATCH * PATCH))[:, None] + pixel[None, :]
    in_patch = (pixel < PATCH * PATCH)[None, :]
    taken = held[:, None] & in_patch
    # All channels in one program: in channels-last memory they share cache lines.
    for channel in range(channels):
        # Rounded once each, from float64: division in fp32 is only nearly exact on a GPU.
        over = tl.full([], 1.0, tl.float64)
        if std is not None:
            over = over / tl.load(std + channel)
        shift = over * 0.0
        if mean is not None:
            shift = -tl.load(mean + channel) * over
        value = tl.load(source, mask=taken, other=0).to(tl.float32)
        value = tl.fma(value, (over * UNIT).to(tl.float32), shift.to(tl.float32))
        value = tl.where(held[:, None], value, 0.0)
        tl.store(to, value.to(out.dtype.element_ty), mask=present[:, None] & in_patch)
        source += channel_stride
        to += PATCH * PATCH


def _triton(
    images: Tensor,
    index: Tensor | None,
    patch_size: int,
    mean: Tensor | None,
    std: Tensor | None,
    dtype: torch.dtype,
    cu_seqlens: Tensor | None,
) -> Tensor:
    batch, channels, height, width = images.shape
    columns = width // patch_size
    patches = height // patch_size * columns
    out = images.new_empty(_shape(images, index, patch_size), dtype=dtype)
    tokens = out.shape[:-1].numel()
    # 16 elements a thread: a load of 16 bytes where a row of a patch has 16 pixels.
    pixels = min(triton.next_power_of_2(patch_size**2), 2048)
    rows = 2048 // pixels
    _patchify_kernel[(triton.cdiv(tokens, rows), triton.cdiv(patch_size**2, pixels))](
        images,
        None if index is None else index.contiguous(),
        None if mean is None else mean.double().contiguous(),
        None if std is None else std.double().contiguous(),
        None if cu_seqlens is None else cu_seqlens.contiguous(),
        out,
        tokens,
        0 if cu_seqlens is not None else out.shape[1],
        batch,
        channels,
        patches,
        columns,
        *images.stride(),
        UNIT=1.0 if images.is_floating_point() else 1 / 255,
        PATCH=patch_size,
        SEARCH=0 if cu_seqlens is None else batch.bit_length(),
        ROWS=rows,
        PIXELS=pixels,
        num_warps=4,
    )
    return out


# --------------------------------------------------------------------------------------------- op


def _single_precision(
    images: Tensor,
    _index: Tensor | None,
    _patch_size: int,
    _mean: Tensor | None,
    _std: Tensor | None,
    dtype: torch.dtype,
    _cu_seqlens: Tensor | None,
) -> bool:
    return torch.float64 not in (images.dtype, dtype)


def _size(images: Tensor, index: Tensor | None, patch_size: int, *_rest: Any) -> tuple[int, int]:
    *tokens, pixels = _shape(images, index, patch_size)
    return math.prod(tokens), pixels


_WAYS = Ways(
    "patchify_gather",
    Way("triton", _triton, takes=_single_precision),
    Way("torch", _reference),
    size=_size,
)


@op("fastjepa::patchify_gather")
def _patchify_gather(
    images: Tensor,
    index: Tensor | None,
    patch_size: int,
    mean: Tensor | None,
    std: Tensor | None,
    dtype: torch.dtype,
    cu_seqlens: Tensor | None,
    preference: str,
) -> Tensor:
    if index is not None:
        _, _, height, width = images.shape
        require_index_values("index", index, (height // patch_size) * (width // patch_size))
        if cu_seqlens is not None:
            require_cu_seqlens_values(cu_seqlens, index.numel())
    if images.numel() == 0:
        return images.new_zeros(_shape(images, index, patch_size), dtype=dtype)
    return _WAYS(preference, images.device, images, index, patch_size, mean, std, dtype, cu_seqlens)


_patchify_gather.refuse_gradients()


@_patchify_gather.register_fake
def _(
    images: Tensor,
    index: Tensor | None,
    patch_size: int,
    mean: Tensor | None,
    std: Tensor | None,
    dtype: torch.dtype,
    cu_seqlens: Tensor | None,
    preference: str,
) -> Tensor:
    return images.new_empty(_shape(images, index, patch_size), dtype=dtype)


@register_flop_formula(torch.ops.fastjepa.patchify_gather)
def _flop(*_shapes: Any, **_keywords: Any) -> int:
    return 0  # FLOP counters count matrix products; this moves bytes


# ---------------------------------------------------------------------------------------- for users


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
    require(images.ndim == 4, lambda: f"images must be [B, C, H, W], got {shape_of(images)}")
    require(
        images.dtype == torch.uint8 or images.dtype in FLOAT_DTYPES,
        lambda: f"images must be uint8 or floating point, got {shape_of(images)}",
    )
    require(dtype in FLOAT_DTYPES, lambda: f"dtype must be floating point, got {dtype}")
    batch, channels, height, width = images.shape
    require(
        isinstance(patch_size, int | torch.SymInt),
        lambda: f"patch_size must be a whole number of pixels, got {patch_size!r}",
    )
    require(
        patch_size > 0 and height % patch_size == 0 and width % patch_size == 0,
        lambda: f"patch_size must divide the image, got {patch_size} for {height} x {width} pixels",
    )
    _require_one_for_each("mean", mean, channels)
    _require_one_for_each("std", std, channels)
    require_same_device(images=images, index=index, cu_seqlens=cu_seqlens)
    require(cu_seqlens is None or index is not None, "cu_seqlens needs a packed index [T]")
    if index is not None:
        require_index("index", index)
        if cu_seqlens is None:
            require(
                index.ndim == 2 and index.shape[0] == batch,
                lambda: f"index must be [B, K] with B = {batch}, got {shape_of(index)}",
            )
        else:
            require(index.ndim == 1, lambda: f"with cu_seqlens, index must be [T], got {shape_of(index)}")
            require_cu_seqlens(cu_seqlens)
            require(
                cu_seqlens.numel() == batch + 1,
                lambda: f"cu_seqlens must have B + 1 = {batch + 1} entries, got {cu_seqlens.numel()}",
            )
    return torch.ops.fastjepa.patchify_gather(
        images.detach(),
        index,
        patch_size,
        _on_device(mean, images.device),
        _on_device(std, images.device),
        dtype,
        cu_seqlens,
        choice.preference(),
    )


def _require_one_for_each(name: str, values: Channels, channels: int) -> None:
    if isinstance(values, Tensor):
        fits = values.shape == (channels,)
    else:
        fits = values is None or (hasattr(values, "__len__") and len(values) == channels)
    require(fits, lambda: f"{name} must have one value for each of {channels} channels, got {values}")


def _on_device(values: Channels, device: torch.device) -> Tensor | None:
    """[C]. Numbers are copied once: a copy in every call could not be part of a CUDA graph."""
    if values is None:
        return None
    if isinstance(values, Tensor):
        # A blocking copy of a handful of numbers would wait for all the work queued on a GPU.
        return values.detach().to(device, non_blocking=device.type == "cuda")
    numbers = tuple(float(value) for value in values)
    if torch.compiler.is_compiling():  # a constant of the graph
        return torch.tensor(numbers, dtype=torch.float64, device=device)
    return _numbers_on_device(numbers, device)


@functools.lru_cache(maxsize=64)
def _numbers_on_device(values: tuple[float, ...], device: torch.device) -> Tensor:
    return torch.tensor(values, dtype=torch.float64, device=device)
