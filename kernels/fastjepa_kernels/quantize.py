"""quantize_rows_: a matrix in float8_e4m3fn with one scale per row, for GEMMs in fp8.

    scale[r] = max |x[r]| / 448;  out[r] = x[r] * (1 / scale[r]), rounded to nearest even

Bytes that must move: each element of x once, one byte per element of the result, and the scales. Needed
after whole rows are there: a sharded weight cuts rows, and with them their maxima.
"""

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from fastjepa_kernels import choice
from fastjepa_kernels.checks import require, require_float, require_same_device, require_writable, shape_of
from fastjepa_kernels.choice import Way, Ways
from fastjepa_kernels.language import architecture, tl, triton
from fastjepa_kernels.launch import dense_rows
from fastjepa_kernels.ops import op
from fastjepa_kernels.overlap import find_shared

_LARGEST = 448.0  # of float8_e4m3fn
_SMALLEST_SCALE = 2.0**-126  # fp32's smallest normal number: rows of zeros, or nearly, are divided by it
_MOST_COLUMNS = 16384  # a row is held in registers, so that it is read once

# --------------------------------------------------------------------------------------- reference


def reference(x: Tensor, out: Tensor, scale: Tensor) -> None:
    x = x.float()
    largest = x.abs().amax(dim=1) if x.shape[1] else x.new_zeros(len(x))
    scale.copy_((largest / _LARGEST).clamp(min=_SMALLEST_SCALE))
    # One division a row, not one an element. Within 448 up to its last bits, or NaN: what a cast does beyond
    # differs between versions of torch.
    out.copy_(x * scale.reciprocal()[:, None])


# ------------------------------------------------------------------------------------------ Triton


def has_e4m3(device: torch.device) -> bool:
    """Whether the instruction that converts to float8_e4m3fn is there: on NVIDIA's GPUs from sm_89 on."""
    return 89 <= architecture(device) < 900  # AMD's numbers are larger, and their e4m3 another one at first


@triton.jit
def to_e4m3(value, HARDWARE: tl.constexpr):
    """Bits of float8_e4m3fn, rounded to nearest even, for magnitudes up to 448 and NaN."""
    if HARDWARE:
        return value.to(tl.float8e4nv).to(tl.uint8, bitcast=True)
    else:
        bits = value.to(tl.int32, bitcast=True)
        magnitude = bits & 0x7FFFFFFF
        # Half of the last bit that stays is added, less one where that bit is even, and 20 bits are cut off.
        normal = ((magnitude + 0x7FFFF + ((magnitude >> 20) & 1)) >> 20) - (127 - 7) * 8
        # Below 2**-6 the steps are 2**-9, which is fp32's own step at 2**14.
        small = (tl.abs(value) + 16384.0).to(tl.int32, bitcast=True) - 0x46800000
        code = tl.where(magnitude < 0x3C800000, small, normal)
        code = tl.where(magnitude < 0x7F800000, code, 0x7F)  # NaN
        return (code | ((bits >> 24) & 0x80)).to(tl.uint8)


@triton.jit
def largest_bits(value, AXIS: tl.constexpr):
    """Along an axis the largest magnitude, as the bits of fp32: NaN is above infinity there, so it stays."""
    return tl.max(value.to(tl.int32, bitcast=True) & 0x7FFFFFFF, axis=AXIS)


@triton.jit
def scale_of(bits):
    """From `largest_bits`, what is divided by."""
    scale = tl.maximum(tl.div_rn(bits.to(tl.float32, bitcast=True), 448.0), 1.1754943508222875e-38)
    return tl.where(bits > 0x7F800000, float("nan"), scale)


@triton.jit
def _quantize_kernel(
    x,  # [R, K]
    out,  # [R, K] of bytes
    scale,  # [R]
    rows,  # R
    columns,  # K
    x_stride,
    out_stride,
    scale_stride,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    HARDWARE: tl.constexpr,  # has the conversion
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    value = tl.load(x + (row.to(tl.int64) * x_stride)[:, None] + column[None, :], mask=inside, other=0.0)
    value = value.to(tl.float32)
    by = scale_of(largest_bits(value, 1))
    code = to_e4m3(value * tl.div_rn(1.0, by)[:, None], HARDWARE)
    tl.store(out + (row.to(tl.int64) * out_stride)[:, None] + column[None, :], code, mask=inside)
    tl.store(scale + row.to(tl.int64) * scale_stride, by, mask=row < rows)


def _triton(x: Tensor, out: Tensor, scale: Tensor) -> None:
    rows, columns = x.shape
    if rows == 0:
        return
    x = dense_rows(x)
    width = max(16, triton.next_power_of_2(columns))
    together = max(1, 2048 // width)
    _quantize_kernel[(triton.cdiv(rows, together),)](
        x,
        out.view(torch.uint8),
        scale,
        rows,
        columns,
        x.stride(0),
        out.stride(0),
        scale.stride(0),
        ROWS=together,
        COLUMNS=width,
        HARDWARE=has_e4m3(x.device),
        num_warps=min(16, max(4, width // 512)),
    )


# ---------------------------------------------------------------------------------------------- op


def _takes(x: Tensor, out: Tensor, scale: Tensor) -> bool:
    return x.dtype != torch.float64 and x.shape[1] <= _MOST_COLUMNS and out.stride(1) == 1


_WAYS = Ways(
    "quantize_rows_",
    Way("triton", _triton, takes=_takes),
    Way("torch", reference),
    size=lambda x, *_rest: tuple(x.shape),
)


@op("fastjepa::quantize_rows_", mutates=("out", "scale"))
def _quantize_rows_(x: Tensor, out: Tensor, scale: Tensor, preference: str) -> None:
    names = ("out", "scale", "x")
    shared = find_shared([out, scale], [x])
    if shared is not None:
        raise ValueError(f"{' and '.join(sorted({names[i] for i in shared}))} must not share memory")
    require_writable([out, scale], names.__getitem__)
    _WAYS(preference, x.device, x, out, scale)


@_quantize_rows_.register_fake
def _(x: Tensor, out: Tensor, scale: Tensor, preference: str) -> None:
    return None


@register_flop_formula(torch.ops.fastjepa.quantize_rows_)
def _flop(*_shapes: Any, **_keywords: Any) -> int:
    return 0  # FLOP counters count matrix products; this moves bytes


# ---------------------------------------------------------------------------------------- for users


@torch.no_grad()
def quantize_rows_(x: Tensor, out: Tensor, scale: Tensor) -> None:
    """Write `x` to `out` in float8_e4m3fn, with a scale per row: out * scale[:, None] is nearly x.

    Within 2**-4 of each element, or half of fp8's smallest step, scale * 2**-10. The largest element of a
    row becomes 448 or -448. An infinity or a NaN makes the whole of its row NaN once it is multiplied out.

    Args:
        x: [R, K] floating point; its rows may be apart.
        out: [R, K] float8_e4m3fn.
        scale: [R] fp32. A row of zeros gets 2**-126, the least there is.

    Raises:
        ValueError: on a wrong shape, dtype or device, shared memory, or out or scale made in inference mode
            and this is outside of it; nothing is written then.
    """
    require(x.ndim == 2, lambda: f"x must be [R, K], got {shape_of(x)}")
    require_float("x", x)
    require_same_device(x=x, out=out, scale=scale)
    require(
        out.dtype == torch.float8_e4m3fn and out.shape == x.shape,
        lambda: f"out must be [R, K] = {list(x.shape)} in float8_e4m3fn, got {shape_of(out)}",
    )
    require(
        scale.dtype == torch.float32 and scale.shape == x.shape[:1],
        lambda: f"scale must be [R] = [{x.shape[0]}] in float32, got {shape_of(scale)}",
    )
    torch.ops.fastjepa.quantize_rows_(x, out, scale, choice.preference())
