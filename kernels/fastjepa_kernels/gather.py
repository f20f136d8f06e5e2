"""gather_tokens: rows of a batch of token grids, each image by its own index list.

    out[b, k] = x[b, index[b, k]] (+ pos[index[b, k]])

Bytes that must move: T rows read and T rows written (twice `T * D * element_size`), and the
index once. The way usually seen expands the index to [B, K, D] int64 and moves five times that.
The gradient reads T rows and writes all B * N, those that nothing was taken from as zeros.
"""

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
    require_float,
    require_index,
    require_index_values,
    require_same_device,
    shape_of,
)
from fastjepa_kernels.choice import Way, Ways
from fastjepa_kernels.gradients import refuse_forward_mode
from fastjepa_kernels.language import architecture, tl, triton
from fastjepa_kernels.launch import columns_per_program, dense_rows
from fastjepa_kernels.ops import op
from fastjepa_kernels.sequences import image_of_row, rows_in_sequences, sequence_of_rows

# ------------------------------------------------------------------------------------- plain torch


def _rows(index: Tensor, cu_seqlens: Tensor | None, patches: int, images_per_sum: int = 1) -> Tensor:
    """int64 [T]: which row of the flat [B / images_per_sum * N, D] each token is of."""
    if cu_seqlens is None:
        image = torch.arange(index.shape[0], device=index.device)[:, None]  # [B, 1]
    else:
        image = sequence_of_rows(cu_seqlens, index.numel())  # [T]
    return (image // images_per_sum * patches + index.long()).flatten()


def _reference(
    x: Tensor, index: Tensor, pos: Tensor | None, cu_seqlens: Tensor | None, dtype: torch.dtype
) -> Tensor:
    batch, patches, width = x.shape
    tokens = x.reshape(batch * patches, width).index_select(0, _rows(index, cu_seqlens, patches))
    if pos is not None:
        wide = torch.float64 if torch.float64 in (x.dtype, pos.dtype) else torch.float32
        tokens = tokens.to(wide) + pos.index_select(0, index.long().flatten()).to(wide)
    if cu_seqlens is not None:
        tokens = torch.where(rows_in_sequences(cu_seqlens, index.numel())[:, None], tokens, 0)
    return tokens.to(dtype).view(*index.shape, width)


def _reference_backward(
    grad: Tensor,
    index: Tensor,
    cu_seqlens: Tensor | None,
    images: int,
    patches: int,
    images_per_sum: int,
    dtype: torch.dtype,
) -> Tensor:
    width = grad.shape[-1]
    sums = -(-images // images_per_sum)
    grad = grad.reshape(-1, width).to(torch.float64 if grad.dtype == torch.float64 else torch.float32)
    if cu_seqlens is not None:
        grad = torch.where(rows_in_sequences(cu_seqlens, index.numel())[:, None], grad, 0)
    rows = _rows(index, cu_seqlens, patches, images_per_sum)
    total = grad.new_zeros(sums * patches, width).index_add_(0, rows, grad)
    return total.to(dtype).view(sums, patches, width)


# ------------------------------------------------------------------------------------------ Triton


# In packed training they are others at every step: one compiled kernel serves all of their values.
_CHANGING = ["tokens", "kept"]


@triton.jit(do_not_specialize=_CHANGING)
def _gather_kernel(
    x,  # [B, N, D]
    index,  # [T]
    pos,  # [N, D] or None
    cu_seqlens,  # [B + 1] or None
    out,  # [T, D]
    tokens,  # T
    kept,  # K; unused if packed
    images,  # B
    patches,  # N
    width,  # D
    x_image_stride,
    x_row_stride,
    pos_row_stride,
    SEARCH: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    present = row < tokens
    if cu_seqlens is None:
        held = present
        image = row // kept
    else:
        held = present & (row < tl.load(cu_seqlens + images))
        image = image_of_row(cu_seqlens, row, images, SEARCH)
    place = tl.load(index + row, mask=held, other=0).to(tl.int64)
    # Nothing outside of x is read, whatever the index says.
    taken = (held & (place >= 0) & (place < patches))[:, None] & (column < width)[None, :]
    start = image.to(tl.int64) * x_image_stride + place * x_row_stride
    value = tl.load(x + start[:, None] + column[None, :], mask=taken, other=0.0)
    if pos is not None:
        added = tl.load(pos + (place * pos_row_stride)[:, None] + column[None, :], mask=taken, other=0.0)
        value = value.to(tl.float32) + added.to(tl.float32)
    to = out + (row.to(tl.int64) * width)[:, None] + column[None, :]
    tl.store(to, value.to(out.dtype.element_ty), mask=present[:, None] & (column < width)[None, :])


@triton.jit(do_not_specialize=_CHANGING)
def _gather_backward_kernel(
    grad,  # [T, D]
    index,  # [T]
    cu_seqlens,  # [B + 1] or None
    out,  # [ceil(B / images_per_sum), N, D]
    tokens,  # T
    kept,  # K; unused if packed
    images,  # B
    patches,  # N
    width,  # D
    images_per_sum,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    SCAN: tl.constexpr,
):
    """Each program owns ROWS rows of the result, finds the tokens taken from them, and writes them once."""
    group = tl.program_id(0)  # the one axis of a grid that may have more than 65,535 programs
    patch = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(2) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    first_image = group * images_per_sum
    for image in range(first_image, tl.minimum(first_image + images_per_sum, images)):
        if cu_seqlens is None:
            start = image * kept
            end = start + kept
        else:
            start = tl.maximum(tl.load(cu_seqlens + image), 0)
            end = tl.minimum(tl.load(cu_seqlens + image + 1), tokens)
        for scanned in range(start, end, SCAN):
            token = scanned + tl.arange(0, SCAN)
            place = tl.load(index + token, mask=token < end, other=0).to(tl.int64)
            inside = (token < end) & (place >= 0) & (place < patches)
            match = (place.to(tl.int32)[None, :] == patch[:, None]) & inside[None, :]  # [ROWS, SCAN]
            # One round where indices are unique; in ascending order of tokens where they repeat.
            for _ in range(tl.max(tl.sum(match.to(tl.int32), axis=1), axis=0)):
                nearest = tl.min(tl.where(match, token[None, :], end), axis=1)  # [ROWS]
                found = (nearest < end)[:, None] & (column < width)[None, :]
                row = grad + (nearest.to(tl.int64) * width)[:, None] + column[None, :]
                total += tl.load(row, mask=found, other=0.0).to(tl.float32)
                match = match & (token[None, :] != nearest[:, None])
    to = out + ((group.to(tl.int64) * patches + patch) * width)[:, None] + column[None, :]
    tl.store(to, total.to(out.dtype.element_ty), mask=(patch < patches)[:, None] & (column < width)[None, :])


def _triton(
    x: Tensor, index: Tensor, pos: Tensor | None, cu_seqlens: Tensor | None, dtype: torch.dtype
) -> Tensor:
    images, patches, width = x.shape
    out = torch.empty(*index.shape, width, dtype=dtype, device=x.device)
    tokens = index.numel()
    x = dense_rows(x)
    pos = None if pos is None else dense_rows(pos)
    columns = columns_per_program(width)
    rows = 4096 // columns  # 32 values a thread: four loads of 16 bytes in flight in bf16
    _gather_kernel[(triton.cdiv(tokens, rows), triton.cdiv(width, columns))](
        x,
        index.contiguous(),
        pos,
        None if cu_seqlens is None else cu_seqlens.contiguous(),
        out,
        tokens,
        0 if cu_seqlens is not None else index.shape[1],
        images,
        patches,
        width,
        x.stride(0),
        x.stride(1),
        0 if pos is None else pos.stride(0),
        SEARCH=0 if cu_seqlens is None else images.bit_length(),
        ROWS=rows,
        COLUMNS=columns,
        num_warps=4,
    )
    return out


def _triton_backward(
    grad: Tensor,
    index: Tensor,
    cu_seqlens: Tensor | None,
    images: int,
    patches: int,
    images_per_sum: int,
    dtype: torch.dtype,
) -> Tensor:
    width = grad.shape[-1]
    sums = -(-images // images_per_sum)
    out = torch.empty(sums, patches, width, dtype=dtype, device=grad.device)
    columns = columns_per_program(width)
    # The search is a tile of rows × SCAN, kept smaller than the tile of values: a larger one spills.
    rows = min(16, 2048 // columns)
    # Left alone, NVIDIA's assembler stops at about 50 registers and spills a few; AMD's has no such limit.
    limit = {} if architecture(grad.device) >= 900 else {"maxnreg": 128}
    _gather_backward_kernel[(sums, triton.cdiv(patches, rows), triton.cdiv(width, columns))](
        grad.contiguous(),
        index.contiguous(),
        None if cu_seqlens is None else cu_seqlens.contiguous(),
        out,
        index.numel(),
        0 if cu_seqlens is not None else index.shape[1],
        images,
        patches,
        width,
        images_per_sum,
        ROWS=rows,
        COLUMNS=columns,
        SCAN=512 // rows,
        num_warps=4,
        **limit,
    )
    return out


# --------------------------------------------------------------------------------------------- C++


def _cpp(
    x: Tensor, index: Tensor, pos: Tensor | None, cu_seqlens: Tensor | None, dtype: torch.dtype
) -> Tensor:
    return torch.ops.fastjepa_native.gather_tokens(x, index, pos, cu_seqlens, dtype)


def _cpp_backward(
    grad: Tensor,
    index: Tensor,
    cu_seqlens: Tensor | None,
    images: int,
    patches: int,
    images_per_sum: int,
    dtype: torch.dtype,
) -> Tensor:
    return torch.ops.fastjepa_native.gather_tokens_backward(
        grad, index, cu_seqlens, images, patches, images_per_sum, dtype
    )


# -------------------------------------------------------------------------------- op and gradient


def _single_precision(x: Tensor, *rest: Any) -> bool:
    return torch.float64 not in (x.dtype, rest[-1]) and not any(
        tensor.dtype == torch.float64 for tensor in rest if isinstance(tensor, Tensor)
    )


_WAYS = Ways(
    "gather_tokens",
    Way("triton", _triton, takes=_single_precision),
    Way("cpp", _cpp),
    Way("torch", _reference),
    size=lambda x, index, *_rest: (index.numel(), x.shape[-1]),
)
_BACKWARD_WAYS = Ways(
    "gather_tokens_backward",
    Way("triton", _triton_backward, takes=_single_precision),
    Way("cpp", _cpp_backward),
    Way("torch", _reference_backward),
    size=lambda grad, index, *_rest: (index.numel(), grad.shape[-1]),
)


@op("fastjepa::gather_tokens")
def _gather_tokens(
    x: Tensor,
    index: Tensor,
    pos: Tensor | None,
    cu_seqlens: Tensor | None,
    dtype: torch.dtype,
    preference: str,
) -> Tensor:
    require_index_values("index", index, x.shape[1])
    if cu_seqlens is not None:
        require_cu_seqlens_values(cu_seqlens, index.numel())
    if x.numel() == 0 or index.numel() == 0:
        return x.new_zeros(*index.shape, x.shape[2], dtype=dtype)
    return _WAYS(preference, x.device, x, index, pos, cu_seqlens, dtype)


@_gather_tokens.register_fake
def _(
    x: Tensor,
    index: Tensor,
    pos: Tensor | None,
    cu_seqlens: Tensor | None,
    dtype: torch.dtype,
    preference: str,
) -> Tensor:
    return x.new_empty(*index.shape, x.shape[2], dtype=dtype)


@op("fastjepa::gather_tokens_backward")
def _gather_tokens_backward(
    grad: Tensor,
    index: Tensor,
    cu_seqlens: Tensor | None,
    images: int,
    patches: int,
    images_per_sum: int,
    dtype: torch.dtype,
    preference: str,
) -> Tensor:
    """[ceil(images / images_per_sum), N, D]: of each group of images, what its tokens add to each patch."""
    if grad.numel() == 0:
        return grad.new_zeros(-(-images // images_per_sum), patches, grad.shape[-1], dtype=dtype)
    return _BACKWARD_WAYS(
        preference, grad.device, grad, index, cu_seqlens, images, patches, images_per_sum, dtype
    )


@_gather_tokens_backward.register_fake
def _(
    grad: Tensor,
    index: Tensor,
    cu_seqlens: Tensor | None,
    images: int,
    patches: int,
    images_per_sum: int,
    dtype: torch.dtype,
    preference: str,
) -> Tensor:
    return grad.new_empty(-(-images // images_per_sum), patches, grad.shape[-1], dtype=dtype)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, index, pos, cu_seqlens, _, ctx.preference = inputs
    ctx.save_for_backward(index, cu_seqlens)
    ctx.images, ctx.patches = x.shape[:2]
    ctx.dtype, ctx.pos_dtype = x.dtype, None if pos is None else pos.dtype


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    index, cu_seqlens = ctx.saved_tensors

    def sums(images_per_sum: int, dtype: torch.dtype) -> Tensor:
        return torch.ops.fastjepa.gather_tokens_backward(
            grad, index, cu_seqlens, ctx.images, ctx.patches, images_per_sum, dtype, ctx.preference
        )

    to_x = sums(1, ctx.dtype) if ctx.needs_input_grad[0] else None
    to_pos = None
    if ctx.needs_input_grad[2]:
        # In so many parts that a GPU is busy, and no more: each part is as large as pos.
        wide = torch.float64 if ctx.pos_dtype == torch.float64 else torch.float32
        to_pos = sums(max(1, -(-ctx.images // 16)), wide).sum(0).to(ctx.pos_dtype)
    return to_x, None, to_pos, None, None, None


def _save_backward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    grad, index, cu_seqlens, ctx.images, _, ctx.images_per_sum, _, ctx.preference = inputs
    ctx.save_for_backward(index, cu_seqlens)
    ctx.dtype = grad.dtype


def _double_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    # Taking rows is linear, so the gradient of its gradient is to take rows again.
    index, cu_seqlens = ctx.saved_tensors
    each = grad.repeat_interleave(ctx.images_per_sum, dim=0)[: ctx.images]
    taken = torch.ops.fastjepa.gather_tokens(each, index, None, cu_seqlens, ctx.dtype, ctx.preference)
    return taken, None, None, None, None, None, None, None


_gather_tokens.register_autograd(_backward, setup_context=_save)
_gather_tokens_backward.register_autograd(_double_backward, setup_context=_save_backward)


@register_flop_formula([torch.ops.fastjepa.gather_tokens, torch.ops.fastjepa.gather_tokens_backward])
def _flop(*_shapes: Any, **_keywords: Any) -> int:
    return 0  # FLOP counters count matrix products; this moves bytes


# ---------------------------------------------------------------------------------------- for users


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
        it asks, any number of times. Gradients are the same bits in every run, except those of the
        "torch" implementation on a GPU.

    Raises:
        ValueError: on a wrong shape, dtype or device; on the CPU, and on a GPU under FASTJEPA_DEBUG=1,
            also for an index out of range. Without it the Triton kernels take zeros for such an index.
        NotImplementedError: in forward-mode differentiation.
    """
    require(x.ndim == 3, lambda: f"x must be [B, N, D], got {shape_of(x)}")
    require_float("x", x)
    refuse_forward_mode("gather_tokens", x, pos)
    require_same_device(x=x, index=index, pos=pos, cu_seqlens=cu_seqlens)
    require_index("index", index)
    if cu_seqlens is None:
        require(
            index.ndim == 2 and index.shape[0] == x.shape[0],
            lambda: f"index must be [B, K] with B = {x.shape[0]}, got {shape_of(index)}",
        )
    else:
        require(index.ndim == 1, lambda: f"with cu_seqlens, index must be [T], got {shape_of(index)}")
        require_cu_seqlens(cu_seqlens)
        require(
            cu_seqlens.numel() == x.shape[0] + 1,
            lambda: f"cu_seqlens must have B + 1 = {x.shape[0] + 1} entries, got {cu_seqlens.numel()}",
        )
    if pos is not None:
        require_float("pos", pos)
        require(
            pos.shape == x.shape[1:], lambda: f"pos must be [N, D] = {list(x.shape[1:])}, got {shape_of(pos)}"
        )
    require(dtype is None or dtype in FLOAT_DTYPES, lambda: f"dtype must be floating point, got {dtype}")
    return torch.ops.fastjepa.gather_tokens(x, index, pos, cu_seqlens, dtype or x.dtype, choice.preference())
