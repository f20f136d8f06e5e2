"""LayerNorm with the residual sum before it, and a backward pass that takes every sum it can on the way.

    total = x + delta;  normed = (total - mean) * rstd * weight + bias          statistics in fp32, over a row

Bytes that must move: x and delta in, total and normed out; backward the gradients of normed and of total in,
total in, the gradient of x out, and normed where it is made once more instead of kept. With the rows in
registers the gradients of weight and bias are sums over rows of what is there, and so are those of the two
linear layers whose output is added before and after: no second pass over any of it.
"""

from typing import Any

import torch
from torch import Tensor

from fastjepa_kernels import choice
from fastjepa_kernels.choice import Way, Ways
from fastjepa_kernels.column_sums import add_parts, multiprocessors
from fastjepa_kernels.language import tl, triton

_MOST_COLUMNS = 4096  # a row is held in registers, and four sums of its size

# --------------------------------------------------------------------------------------- reference


def _reference(
    x: Tensor, delta: Tensor | None, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    total = x if delta is None else x + delta
    normed, mean, rstd = torch.native_layer_norm(total, (x.shape[1],), weight, bias, eps)
    return total, normed, mean, rstd


def _reference_backward(
    grad: Tensor,
    through: Tensor | None,
    total: Tensor,
    weight: Tensor,
    bias: Tensor,
    mean: Tensor,
    rstd: Tensor,
    remake: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:
    dx, dweight, dbias = torch.ops.aten.native_layer_norm_backward(
        grad, total, (total.shape[1],), mean, rstd, weight, bias, [True, True, True]
    )
    normed = None
    if remake:
        wide = torch.promote_types(total.dtype, torch.float32)
        normal = (total.to(wide) - mean.view(-1, 1)) * rstd.view(-1, 1)
        normed = torch.addcmul(bias.to(wide), normal, weight.to(wide)).to(total.dtype)
    if through is not None:
        dx += through
    passed = torch.zeros_like(dbias) if through is None else through.sum(dim=0)
    return dx, torch.stack([dweight, dbias, passed, dx.sum(dim=0)]), normed


# ------------------------------------------------------------------------------------------ Triton


@triton.jit
def _forward_kernel(
    x,  # [T, D]
    delta,  # [T, D] or None
    weight,  # [D]
    bias,  # [D]
    total,  # [T, D] or None
    normed,  # [T, D]
    mean,  # fp32 [T]
    rstd,  # fp32 [T]
    rows,
    width,
    eps,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)
    in_width = (column < width)[None, :]
    inside = (row < rows)[:, None] & in_width
    at = row.to(tl.int64)[:, None] * width + column[None, :]
    value = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    if delta is not None:
        value += tl.load(delta + at, mask=inside, other=0.0).to(tl.float32)
        # Normalised as it is kept, rounded: the backward pass sees that.
        rounded = value.to(total.dtype.element_ty)
        tl.store(total + at, rounded, mask=inside)
        value = rounded.to(tl.float32)
    middle = tl.sum(value, axis=1) / width
    centred = tl.where(inside, value - middle[:, None], 0.0)
    scale = 1.0 / tl.sqrt(tl.sum(centred * centred, axis=1) / width + eps)
    out = centred * scale[:, None]
    out *= tl.load(weight + column[None, :], mask=in_width, other=0.0).to(tl.float32)
    out += tl.load(bias + column[None, :], mask=in_width, other=0.0).to(tl.float32)
    tl.store(normed + at, out.to(normed.dtype.element_ty), mask=inside)
    tl.store(mean + row, middle, mask=row < rows)
    tl.store(rstd + row, scale, mask=row < rows)


@triton.jit
def _backward_kernel(
    grad,  # [T, D], of normed
    through,  # [T, D], of total, or None
    total,  # [T, D]
    weight,  # [D]
    bias,  # [D], or None
    mean,  # fp32 [T]
    rstd,  # fp32 [T]
    dx,  # [T, D]
    normed,  # [T, D] with a bias
    parts,  # fp32 [programs, 4, D]
    rows,
    width,
    programs,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    # [2, ROWS, COLUMNS / 2]: a thread has columns of both halves of a row, so that a row takes as few warps
    # as its sums leave registers for, and that of a narrow row waits for no other.
    row_here = tl.arange(0, ROWS)[None, :, None]
    column = tl.arange(0, 2)[:, None, None] * (COLUMNS // 2) + tl.arange(0, COLUMNS // 2)[None, None, :]
    in_width = column < width
    w = tl.load(weight + column, mask=in_width, other=0.0).to(tl.float32)
    dweight = tl.zeros([2, ROWS, COLUMNS // 2], tl.float32)
    dbias = tl.zeros([2, ROWS, COLUMNS // 2], tl.float32)
    passed = tl.zeros([2, ROWS, COLUMNS // 2], tl.float32)
    left = tl.zeros([2, ROWS, COLUMNS // 2], tl.float32)
    for first in range(tl.program_id(0) * ROWS, rows, programs * ROWS):
        row = first + row_here
        present = row < rows
        inside = present & in_width
        at = row.to(tl.int64) * width + column
        g = tl.load(grad + at, mask=inside, other=0.0).to(tl.float32)
        value = tl.load(total + at, mask=inside, other=0.0).to(tl.float32)
        if through is not None:
            t = tl.load(through + at, mask=inside, other=0.0).to(tl.float32)
        middle = tl.load(mean + row, mask=present, other=0.0)
        scale = tl.load(rstd + row, mask=present, other=0.0)
        normal = tl.where(inside, (value - middle) * scale, 0.0)
        if bias is not None:  # once more as the forward pass made it
            made = normal * w + tl.load(bias + column, mask=in_width, other=0.0).to(tl.float32)
            tl.store(normed + at, made.to(normed.dtype.element_ty), mask=inside)
        dweight += g * normal
        dbias += g
        g *= w
        along = tl.sum(tl.sum(g * normal, axis=2), axis=0)[None, :, None] / width
        flat = tl.sum(tl.sum(g, axis=2), axis=0)[None, :, None] / width
        out = (g - normal * along - flat) * scale
        if through is not None:
            passed += t
            out += t
        rounded = out.to(dx.dtype.element_ty)
        tl.store(dx + at, rounded, mask=inside)
        left += tl.where(inside, rounded.to(tl.float32), 0.0)
    to = parts + tl.program_id(0).to(tl.int64) * (4 * width)
    to += tl.arange(0, 2)[:, None] * (COLUMNS // 2) + tl.arange(0, COLUMNS // 2)[None, :]
    here = (tl.arange(0, 2)[:, None] * (COLUMNS // 2) + tl.arange(0, COLUMNS // 2)[None, :]) < width
    tl.store(to, tl.sum(dweight, axis=1), mask=here)
    tl.store(to + width, tl.sum(dbias, axis=1), mask=here)
    tl.store(to + 2 * width, tl.sum(passed, axis=1), mask=here)
    tl.store(to + 3 * width, tl.sum(left, axis=1), mask=here)


def _triton(
    x: Tensor, delta: Tensor | None, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows, width = x.shape
    x = x.contiguous()
    total = x if delta is None else torch.empty_like(x)
    normed = torch.empty_like(x)
    mean, rstd = x.new_empty(2, rows, dtype=torch.float32)
    if rows:
        columns = triton.next_power_of_2(width)
        together = max(1, 2048 // columns)
        _forward_kernel[(triton.cdiv(rows, together),)](
            x, None if delta is None else delta.contiguous(), weight.contiguous(), bias.contiguous(),
            None if delta is None else total, normed, mean, rstd, rows, width, eps,
            ROWS=together, COLUMNS=columns, num_warps=max(4, columns // 512),
        )  # fmt: skip
    return total, normed, mean, rstd


def _triton_backward(
    grad: Tensor,
    through: Tensor | None,
    total: Tensor,
    weight: Tensor,
    bias: Tensor,
    mean: Tensor,
    rstd: Tensor,
    remake: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:
    rows, width = total.shape
    total = total.contiguous()  # torch's forward pass keeps a view as it came
    dx = torch.empty_like(total)
    normed = torch.empty_like(total) if remake else None
    columns = max(64, triton.next_power_of_2(width))
    # 16 elements a thread, of each sum as well: 168 registers. As many programs as run at a time: each goes
    # on until the rows are done, so one more would wait for all of it.
    together = max(1, 2048 // columns)
    programs = max(1, min(triton.cdiv(rows, together), 3 * multiprocessors(total.device)))
    parts = total.new_empty(programs, 4, width, dtype=torch.float32)
    _backward_kernel[(programs,)](
        grad.contiguous(), None if through is None else through.contiguous(), total, weight.contiguous(),
        bias.contiguous() if remake else None, mean, rstd, dx, normed, parts, rows, width, programs,
        ROWS=together, COLUMNS=columns, num_warps=max(4, columns // 512),
    )  # fmt: skip
    return dx, add_parts(parts, weight.dtype), normed


def _takes(x: Tensor, *_rest: Any) -> bool:
    return x.dtype != torch.float64 and x.shape[1] <= _MOST_COLUMNS


_WAYS = Ways("add_layer_norm", Way("triton", _triton, takes=_takes), Way("torch", _reference))
_BACKWARD_WAYS = Ways(
    "add_layer_norm_backward",
    Way("triton", _triton_backward, takes=_takes),
    Way("torch", _reference_backward),
)

# ---------------------------------------------------------------------------- for the other kernels


def add_layer_norm(
    x: Tensor,
    delta: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    preference: str | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Normalise x + delta, [T, D] each.

    Args:
        preference: see `choice.preference`, which it is by default.

    Returns:
        total [T, D], which is x itself without a delta; normed [T, D]; mean and rstd, [T] or [T, 1], in fp32
        or wider.
    """
    preference = choice.preference() if preference is None else preference
    return _WAYS(preference, x.device, x, delta, weight, bias, eps)


def add_layer_norm_backward(
    grad: Tensor,
    through: Tensor | None,
    total: Tensor,
    weight: Tensor,
    bias: Tensor,
    mean: Tensor,
    rstd: Tensor,
    remake: bool = False,
    preference: str | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The gradient of x, which is that of delta too, and sums over rows.

    Args:
        grad: [T, D], of normed.
        through: [T, D], of total, from whatever else reads it; None for nothing.
        remake: give normed as well.
        preference: that of the forward pass; by default what is asked for now.

    Returns:
        dx [T, D]; [4, D] in the dtype of the weight: the gradients of weight and bias, the sum of `through`
        (of the bias of a linear layer that is added to total later), that of dx (of one added before); normed
        [T, D] or None.
    """
    arguments = grad, through, total, weight, bias, mean, rstd, remake
    preference = choice.preference() if preference is None else preference
    return _BACKWARD_WAYS(preference, grad.device, *arguments)
