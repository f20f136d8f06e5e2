"""Sums over the rows of a [T, K] matrix, in fp32 and in one order: the gradients of biases.

A program adds up every so many rows of a block of columns, and leaves its part for a second kernel to add. No
atomics, so the same bits every time. `gelu_backward_` takes such sums of what it writes, and can make gelu(x)
once more, which then need not be kept.

Bytes that must move: x once; for `gelu_backward_` the gradient and x in, the gradient and gelu(x) out.
"""

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from fastjepa_kernels import choice
from fastjepa_kernels.choice import Way, Ways
from fastjepa_kernels.language import tl, triton

_ROWS, _COLUMNS = 8, 256
_TERMS, _SUMS = 64, 32  # parts and columns in flight at a time in the second kernel

# --------------------------------------------------------------------------------------- reference


def _reference(x: Tensor) -> Tensor:
    return x.sum(dim=0)


def _gelu_reference(grad: Tensor, x: Tensor, remake: bool) -> tuple[Tensor, Tensor | None]:
    torch.ops.aten.gelu_backward.grad_input(grad, x, grad_input=grad)
    return grad.sum(dim=0), F.gelu(x) if remake else None


# ------------------------------------------------------------------------------------------ Triton


@triton.jit
def _parts_kernel(
    grad,  # [T, K]; overwritten with GELU
    x,  # [T, K] or None
    active,  # [T, K] dense, or None
    parts,  # fp32 [programs, K]
    rows,
    columns,
    programs,
    row_stride,
    x_stride,
    GELU: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    within = (column < columns)[None, :]
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for first in range(tl.program_id(1) * ROWS, rows, programs * ROWS):
        row = (first + tl.arange(0, ROWS)).to(tl.int64)[:, None]
        inside = (row < rows) & within
        at = grad + (row * row_stride + column[None, :])
        value = tl.load(at, mask=inside, other=0.0).to(tl.float32)
        if GELU:
            u = tl.load(x + (row * x_stride + column[None, :]), mask=inside, other=0.0).to(tl.float32)
            # d/du of u * cdf(u) is cdf(u) + u * pdf(u), of the normal distribution.
            cdf = 0.5 * (1.0 + tl.math.erf(u * 0.7071067811865476))
            pdf = 0.3989422804014327 * tl.exp(-0.5 * u * u)
            if active is not None:
                made = (u * cdf).to(active.dtype.element_ty)
                tl.store(active + (row * columns + column[None, :]), made, mask=inside)
            value = (value * (cdf + u * pdf)).to(grad.dtype.element_ty)
            tl.store(at, value, mask=inside)
            value = value.to(tl.float32)
        total += value
    to = parts + tl.program_id(1).to(tl.int64) * columns + column
    tl.store(to, tl.sum(total, axis=0), mask=column < columns)


@triton.jit
def add_parts_kernel(
    parts,  # fp32 [programs, K]
    out,  # [K]
    programs,
    columns,
    TERMS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros([TERMS, COLUMNS], tl.float32)
    for first in range(0, programs, TERMS):
        term = first + tl.arange(0, TERMS)[:, None]
        inside = (term < programs) & (column < columns)[None, :]
        total += tl.load(parts + (term * columns + column[None, :]), mask=inside, other=0.0)
    tl.store(out + column, tl.sum(total, axis=0).to(out.dtype.element_ty), mask=column < columns)


def add_parts(parts: Tensor, dtype: torch.dtype) -> Tensor:
    """The sum over the first dimension of fp32 [programs, ...], in order."""
    programs, columns = parts.shape[0], parts[0].numel()
    out = parts.new_empty(parts.shape[1:], dtype=dtype)
    add_parts_kernel[(triton.cdiv(columns, _SUMS),)](
        parts, out, programs, columns, TERMS=_TERMS, COLUMNS=_SUMS, num_warps=4
    )
    return out


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """Of a GPU; as many as a Hopper has where there is none to ask."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 132


def _launch(grad: Tensor, x: Tensor | None = None, active: Tensor | None = None) -> Tensor:
    rows, columns = grad.shape
    if grad.stride(1) != 1:  # of a mean or a sum, which are expanded from one number
        grad = grad.contiguous()
    if rows == 0:
        return grad.new_zeros(columns)
    blocks = triton.cdiv(columns, _COLUMNS)
    programs = max(1, min(triton.cdiv(rows, _ROWS), 4 * multiprocessors(grad.device) // blocks))
    parts = grad.new_empty(programs, columns, dtype=torch.float32)
    _parts_kernel[(blocks, programs)](
        grad,
        x,
        active,
        parts,
        rows,
        columns,
        programs,
        grad.stride(0),
        0 if x is None else x.stride(0),
        GELU=x is not None,
        ROWS=_ROWS,
        COLUMNS=_COLUMNS,
        num_warps=8,
    )
    return add_parts(parts, grad.dtype)


def _gelu_triton(grad: Tensor, x: Tensor, remake: bool) -> tuple[Tensor, Tensor | None]:
    active = x.new_empty(x.shape) if remake else None
    return _launch(grad, x, active), active


def _takes(x: Tensor) -> bool:
    return x.dtype != torch.float64


def _takes_gelu(grad: Tensor, x: Tensor, _remake: bool) -> bool:
    return _takes(grad) and grad.stride(1) == x.stride(1) == 1


_WAYS = Ways("column_sums", Way("triton", _launch, takes=_takes), Way("torch", _reference))
_GELU_WAYS = Ways(
    "gelu_backward_",
    Way("triton", _gelu_triton, takes=_takes_gelu),
    Way("torch", _gelu_reference),
)

# ---------------------------------------------------------------------------- for the other kernels


def column_sums(x: Tensor, preference: str | None = None) -> Tensor:
    """[K], in the dtype of x [T, K]; added up in fp32 on a GPU.

    Args:
        preference: that of a forward pass; by default what is asked for now.
    """
    return _WAYS(choice.preference() if preference is None else preference, x.device, x)


def gelu_backward_(
    grad: Tensor, x: Tensor, remake: bool, preference: str | None = None
) -> tuple[Tensor, Tensor | None]:
    """Turn `grad` [T, K], of gelu(x), into that of x [T, K] in place.

    The exact GELU, x * cdf(x), of arXiv:1606.08415.

    Args:
        remake: give gelu(x) as well.
        preference: that of the forward pass; by default what is asked for now.

    Returns:
        its column sums [K], and with `remake` gelu(x) [T, K].
    """
    preference = choice.preference() if preference is None else preference
    return _GELU_WAYS(preference, grad.device, grad, x, remake)
