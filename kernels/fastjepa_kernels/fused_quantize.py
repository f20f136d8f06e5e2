"""layer_norm_quantize, gelu_quantize: what stands before a GEMM in fp8, quantised in the same pass.

    y = layer_norm(x) * weight + bias        or    y = gelu(x) = x / 2 * (1 + erf(x / sqrt(2)))
    scale[t] = max |y[t]| / 448;  q[t] = y[t] * (1 / scale[t]) in float8_e4m3fn, rounded to nearest even

Bytes that must move: each element of x once, a byte per element of the result, and the scales: 3 per element
of bf16, where separate passes move 7. With a residual, x + residual is formed, rounded to x's dtype, written
and normalised while it is in registers: 7 per element, and the stream of the next block is there. Statistics,
GELU and scales are computed in fp32.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from fastjepa_kernels import choice
from fastjepa_kernels import quantize as rows_in_fp8
from fastjepa_kernels.checks import require, require_float, require_same_device, shape_of
from fastjepa_kernels.choice import Way, Ways
from fastjepa_kernels.language import tl, triton
from fastjepa_kernels.launch import dense_rows
from fastjepa_kernels.ops import op
from fastjepa_kernels.quantize import has_e4m3, largest_bits, scale_of, to_e4m3

_MOST_COLUMNS = 8192  # a row is held in registers, so that it is read once

# --------------------------------------------------------------------------------------- reference


def _empty(x: Tensor) -> tuple[Tensor, Tensor]:
    """q and scale, unwritten."""
    return x.new_empty(x.shape, dtype=torch.float8_e4m3fn), x.new_empty(len(x), dtype=torch.float32)


def _empty_total(x: Tensor, residual: Tensor | None) -> Tensor:
    return x.new_empty(x.shape if residual is not None else (0, x.shape[1]))


def _work_dtype(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _reference_layer_norm(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, residual: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    total = x if residual is None else (x + residual).contiguous()
    work = _work_dtype(x)
    normalised = F.layer_norm(total.to(work), x.shape[1:], weight.to(work), bias.to(work), eps)
    q, scale = _empty(x)
    rows_in_fp8.reference(normalised, q, scale)
    return q, scale, _empty_total(x, None) if residual is None else total


def _reference_gelu(x: Tensor) -> tuple[Tensor, Tensor]:
    q, scale = _empty(x)
    rows_in_fp8.reference(F.gelu(x.to(_work_dtype(x))), q, scale)
    return q, scale


# ------------------------------------------------------------------------------------------ Triton

# A row is cut in two blocks, each a power of two, so that of the usual widths (768 = 512 + 256,
# 5120 = 4096 + 1024) no lane is idle.


@triton.jit
def _load_added(x, residual, total, x_at, residual_at, total_at, inside):
    """x, or x + residual as it is written to total; in fp32."""
    value = tl.load(x + x_at, mask=inside, other=0.0).to(tl.float32)
    if residual is not None:
        value += tl.load(residual + residual_at, mask=inside, other=0.0).to(tl.float32)
        rounded = value.to(total.dtype.element_ty)
        tl.store(total + total_at, rounded, mask=inside)
        value = rounded.to(tl.float32)
    return value


@triton.jit
def _affine(value, weight, bias, column, width):
    in_width = (column < width)[None, :]
    w = tl.load(weight + column[None, :], mask=in_width, other=0.0).to(tl.float32)
    b = tl.load(bias + column[None, :], mask=in_width, other=0.0).to(tl.float32)
    return value * w + b


@triton.jit
def _layer_norm_kernel(
    x,  # [T, D]
    residual,  # [T, D] or None
    weight,  # [D]
    bias,  # [D]
    total,  # [T, D] or None
    q,  # [T, D] of bytes
    scale,  # [T]
    tokens,  # T
    width,  # D
    x_stride,
    residual_stride,
    eps,
    ROWS: tl.constexpr,
    HEAD: tl.constexpr,
    TAIL: tl.constexpr,  # 0 if the head holds whole rows
    HARDWARE: tl.constexpr,  # has the conversion
):
    token = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    present = (token < tokens)[:, None]
    x_row = (token.to(tl.int64) * x_stride)[:, None]
    residual_row = (token.to(tl.int64) * residual_stride)[:, None]
    row = (token.to(tl.int64) * width)[:, None]

    at = tl.arange(0, HEAD)
    inside = present & (at < width)[None, :]
    there = at[None, :]
    head = _load_added(x, residual, total, x_row + there, residual_row + there, row + there, inside)
    sums = tl.sum(head, axis=1)
    if TAIL > 0:
        tail_at = HEAD + tl.arange(0, TAIL)
        tail_inside = present & (tail_at < width)[None, :]
        there = tail_at[None, :]
        tail = _load_added(x, residual, total, x_row + there, residual_row + there, row + there, tail_inside)
        sums += tl.sum(tail, axis=1)

    mean = (sums / width)[:, None]
    head = tl.where(inside, head - mean, 0.0)
    squares = tl.sum(head * head, axis=1)
    if TAIL > 0:
        tail = tl.where(tail_inside, tail - mean, 0.0)
        squares += tl.sum(tail * tail, axis=1)
    by_deviation = (1.0 / tl.sqrt(squares / width + eps))[:, None]

    head = _affine(head * by_deviation, weight, bias, at, width)
    bits = largest_bits(head, 1)
    if TAIL > 0:
        tail = _affine(tail * by_deviation, weight, bias, tail_at, width)
        bits = tl.maximum(bits, largest_bits(tail, 1))
    divisor = scale_of(bits)
    factor = tl.div_rn(1.0, divisor)[:, None]
    tl.store(q + row + at[None, :], to_e4m3(head * factor, HARDWARE), mask=inside)
    if TAIL > 0:
        tl.store(q + row + tail_at[None, :], to_e4m3(tail * factor, HARDWARE), mask=tail_inside)
    tl.store(scale + token, divisor, mask=token < tokens)


@triton.jit
def _gelu(x):
    """max(x, 0) - |x| Q(|x|), with Q the normal distribution's upper tail; within 5e-6 of it, and of x.

    An erf as a GPU's library has it takes 30 instructions more an element, twice the time of the bytes. Here
    Q(a) = exp(-a a / 2) p(1 / (1 + .31 a)), the form of Abramowitz and Stegun 26.2.17, with p fitted to the
    relative error of Q from 0 to 13.5; there is nothing left of it beyond.
    """
    magnitude = tl.abs(x)
    t = 1.0 / (1.0 + 0.31 * magnitude)
    p = -0.07392765995821 * t + 0.18044521087713633
    p = p * t + 0.015751616015526798
    p = p * t + 0.13342532157848797
    p = p * t + 0.12044264936280752
    p = p * t + 0.12386054263487373
    tail = p * t * tl.exp2(x * x * -0.7213475204444817)  # -log2(e) / 2
    return tl.maximum(x, 0.0) - magnitude * tail


@triton.jit
def _gelu_kernel(
    x,  # [T, K]
    q,  # [T, K] of bytes
    scale,  # [T]
    width,  # K
    x_stride,
    HEAD: tl.constexpr,
    TAIL: tl.constexpr,  # 0 if the head holds whole rows
    HARDWARE: tl.constexpr,  # has the conversion
):
    # A program has one row: its scale is a scalar, so that no layout of the head is asked of the tail, for
    # which GELU was computed again.
    token = tl.program_id(0).to(tl.int64)
    x += token * x_stride
    q += token * width
    at = tl.arange(0, HEAD)
    inside = at < width
    head = _gelu(tl.load(x + at, mask=inside, other=0.0).to(tl.float32))
    bits = largest_bits(head, 0)
    if TAIL > 0:
        tail_at = HEAD + tl.arange(0, TAIL)
        tail_inside = tail_at < width
        tail = _gelu(tl.load(x + tail_at, mask=tail_inside, other=0.0).to(tl.float32))
        bits = tl.maximum(bits, largest_bits(tail, 0))
    divisor = scale_of(bits)
    factor = tl.div_rn(1.0, divisor)
    tl.store(q + at, to_e4m3(head * factor, HARDWARE), mask=inside)
    if TAIL > 0:
        tl.store(q + tail_at, to_e4m3(tail * factor, HARDWARE), mask=tail_inside)
    tl.store(scale + token, divisor)


def _blocks(width: int) -> tuple[int, int]:
    """Powers of two, head and tail, that together hold a row; the tail may be 0."""
    head = max(16, 1 << (width.bit_length() - 1))
    return head, triton.next_power_of_2(width - head) if width > head else 0


def _triton_layer_norm(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, residual: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    (q, scale), total = _empty(x), _empty_total(x, residual)
    if len(x) == 0:
        return q, scale, total
    x = dense_rows(x)
    residual = None if residual is None else dense_rows(residual)
    tokens, width = x.shape
    head, tail = _blocks(width)
    rows = max(1, 2048 // head)
    # 16 elements of the head a thread, and at most as many of the tail.
    _layer_norm_kernel[(triton.cdiv(tokens, rows),)](
        x,
        residual,
        weight.contiguous(),
        bias.contiguous(),
        None if residual is None else total,
        q.view(torch.uint8),
        scale,
        tokens,
        width,
        x.stride(0),
        0 if residual is None else residual.stride(0),
        eps,
        ROWS=rows,
        HEAD=head,
        TAIL=tail,
        HARDWARE=has_e4m3(x.device),
        num_warps=max(4, head // 512),
    )
    return q, scale, total


def _triton_gelu(x: Tensor) -> tuple[Tensor, Tensor]:
    q, scale = _empty(x)
    if len(x) == 0:
        return q, scale
    x = dense_rows(x)
    head, tail = _blocks(x.shape[1])
    _gelu_kernel[(len(x),)](
        x,
        q.view(torch.uint8),
        scale,
        x.shape[1],
        x.stride(0),
        HEAD=head,
        TAIL=tail,
        HARDWARE=has_e4m3(x.device),
        num_warps=max(1, head // 512),
    )
    return q, scale


# ---------------------------------------------------------------------------------------------- op


def _takes(x: Tensor, *_rest: Any) -> bool:
    return x.dtype != torch.float64 and x.shape[1] <= _MOST_COLUMNS


def _size(x: Tensor, *_rest: Any) -> tuple[int, ...]:
    return tuple(x.shape)


_LAYER_NORM_WAYS = Ways(
    "layer_norm_quantize",
    Way("triton", _triton_layer_norm, takes=_takes),
    Way("torch", _reference_layer_norm),
    size=_size,
)
_GELU_WAYS = Ways(
    "gelu_quantize", Way("triton", _triton_gelu, takes=_takes), Way("torch", _reference_gelu), size=_size
)


@op("fastjepa::layer_norm_quantize")
def _layer_norm_quantize(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, residual: Tensor | None, preference: str
) -> tuple[Tensor, Tensor, Tensor]:
    """q, scale and x + residual: [T, D], or [0, D] without a residual."""
    return _LAYER_NORM_WAYS(preference, x.device, x, weight, bias, eps, residual)


_layer_norm_quantize.refuse_gradients()


@_layer_norm_quantize.register_fake
def _(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, residual: Tensor | None, preference: str
) -> tuple[Tensor, Tensor, Tensor]:
    return *_empty(x), _empty_total(x, residual)


@op("fastjepa::gelu_quantize")
def _gelu_quantize(x: Tensor, preference: str) -> tuple[Tensor, Tensor]:
    return _GELU_WAYS(preference, x.device, x)


_gelu_quantize.refuse_gradients()


@_gelu_quantize.register_fake
def _(x: Tensor, preference: str) -> tuple[Tensor, Tensor]:
    return _empty(x)


@register_flop_formula([torch.ops.fastjepa.layer_norm_quantize, torch.ops.fastjepa.gelu_quantize])
def _flop(*_shapes: Any, **_keywords: Any) -> int:
    return 0  # FLOP counters count matrix products; this moves bytes


# ---------------------------------------------------------------------------------------- for users


def _require_matrix(x: Tensor, shape: str) -> None:
    require(x.ndim == 2 and x.shape[1] > 0, lambda: f"x must be {shape}, got {shape_of(x)}")
    require_float("x", x)


@torch.no_grad()
def layer_norm_quantize(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-6, residual: Tensor | None = None
) -> tuple[Tensor, ...]:
    """Layer norm over the width, then float8_e4m3fn with a scale per row, as the input of `fp8_linear`.

    q * scale[:, None] is within 2**-4 of each normalised element, or half of fp8's smallest step,
    scale * 2**-10. A row that holds an infinity or a NaN is NaN once it is multiplied out. There is no
    gradient: this is for passes without one.

    Args:
        x: [T, D] floating point; its rows may be apart.
        weight, bias: [D] floating point.
        eps: added to the variance.
        residual: [T, D] of x's dtype, added to x before.

    Returns:
        q [T, D] float8_e4m3fn and scale [T] fp32; with a residual also x + residual [T, D] in x's dtype,
        which is what was normalised.

    Raises:
        ValueError: on a wrong shape, dtype or device.
    """
    _require_matrix(x, "[T, D]")
    for name, tensor in (("weight", weight), ("bias", bias)):
        require(tensor.shape == x.shape[1:], f"{name} must be [D] = [{x.shape[1]}], got {shape_of(tensor)}")
        require_float(name, tensor)
    require(
        residual is None or (residual.shape == x.shape and residual.dtype == x.dtype),
        lambda: f"residual must be like x, {shape_of(x)}, got {residual is not None and shape_of(residual)}",
    )
    require_same_device(x=x, weight=weight, bias=bias, residual=residual)
    q, scale, total = torch.ops.fastjepa.layer_norm_quantize(
        x, weight, bias, eps, residual, choice.preference()
    )
    return (q, scale) if residual is None else (q, scale, total)


@torch.no_grad()
def gelu_quantize(x: Tensor) -> tuple[Tensor, Tensor]:
    """The exact GELU, x / 2 * (1 + erf(x / sqrt(2))), then float8_e4m3fn with a scale per row.

    Bounds and what is not finite as in `layer_norm_quantize`. There is no gradient.

    Args:
        x: [T, K] floating point; its rows may be apart.

    Returns:
        q [T, K] float8_e4m3fn and scale [T] fp32.

    Raises:
        ValueError: on a wrong shape or dtype.
    """
    _require_matrix(x, "[T, K]")
    return torch.ops.fastjepa.gelu_quantize(x, choice.preference())
