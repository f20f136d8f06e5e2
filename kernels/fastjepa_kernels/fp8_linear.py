"""fp8_linear: a linear layer whose input and weight are float8_e4m3fn with a scale per row.

    out = (q * scale[:, None]) @ (weight_q * weight_scale[:, None]).T + bias

Twice the matrix throughput of bf16 on GPUs that have it (NVIDIA's from sm_89 on), and half the bytes of both
inputs. The product is torch's own `_scaled_mm`; what is here makes the call that it takes.
"""

import functools
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from fastjepa_kernels.checks import require, require_float, require_same_device, shape_of
from fastjepa_kernels.ops import op

_FP8 = torch.float8_e4m3fn
_MULTIPLE = 16  # that K and N must be of
_ALIGNED = 16  # bytes that a bias must begin at
_OUT_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)

# --------------------------------------------------------------------------------------- reference


def _reference(
    q: Tensor,
    scale: Tensor,
    weight_q: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    out_dtype: torch.dtype,
) -> Tensor:
    """The product of the codes first: its terms are exact in fp32, as they are in the hardware."""
    work = torch.promote_types(out_dtype, torch.float32)
    out = q.to(work) @ weight_q.to(work).t()
    out = out * scale.to(work)[:, None] * weight_scale.to(work)
    return (out if bias is None else out + bias.to(work)).to(out_dtype)


# ------------------------------------------------------------------------------------- matrix units


def fp8_available(device: torch.device | str) -> bool:
    """Whether the device multiplies matrices in fp8: NVIDIA's do from sm_89 on, where torch has the call."""
    return _available(torch.device(device))


@functools.cache
def _available(device: torch.device) -> bool:
    if device.type != "cuda" or torch.version.hip is not None or not hasattr(torch, "_scaled_mm"):
        return False
    return torch.cuda.is_available() and torch.cuda.get_device_capability(device) >= (8, 9)


def _scaled_mm(
    q: Tensor, scale: Tensor, weight_q: Tensor, weight_scale: Tensor, bias: Tensor | None
) -> Tensor:
    if bias is not None:
        bias = bias.to(torch.bfloat16).contiguous()
        if bias.data_ptr() % _ALIGNED:  # a view into a buffer of many parameters
            bias = bias.clone()
    # Fast accumulation keeps about 14 bits of a partial sum on Hopper; a factor in e4m3 has 4.
    return torch._scaled_mm(
        q.contiguous(),
        weight_q.contiguous().t(),
        scale_a=scale.contiguous().view(-1, 1),
        scale_b=weight_scale.contiguous().view(1, -1),
        bias=bias,
        out_dtype=torch.bfloat16,
        use_fast_accum=True,
    )


# ---------------------------------------------------------------------------------------------- op


@op("fastjepa::fp8_linear")
def _fp8_linear(
    q: Tensor,
    scale: Tensor,
    weight_q: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    out_dtype: torch.dtype,
) -> Tensor:
    rows, columns = weight_q.shape
    fits = rows % _MULTIPLE == 0 and columns % _MULTIPLE == 0
    if not (fits and out_dtype == torch.bfloat16 and fp8_available(q.device)):
        return _reference(q, scale, weight_q, weight_scale, bias, out_dtype)
    if q.device.index == torch.cuda.current_device():
        return _scaled_mm(q, scale, weight_q, weight_scale, bias)
    with torch.cuda.device(q.device):  # it is the current device's kernels that are looked for
        return _scaled_mm(q, scale, weight_q, weight_scale, bias)


_fp8_linear.refuse_gradients()


@_fp8_linear.register_fake
def _(
    q: Tensor,
    scale: Tensor,
    weight_q: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    out_dtype: torch.dtype,
) -> Tensor:
    return q.new_empty((q.shape[0], weight_q.shape[0]), dtype=out_dtype)


@register_flop_formula(torch.ops.fastjepa.fp8_linear)
def _flop(q: Any, scale: Any, weight_q: Any, *_shapes: Any, **_keywords: Any) -> int:
    return 2 * q[0] * q[1] * weight_q[0]


# ---------------------------------------------------------------------------------------- for users


@torch.no_grad()
def fp8_linear(
    q: Tensor,
    scale: Tensor,
    weight_q: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None = None,
    out_dtype: torch.dtype = torch.bfloat16,
) -> Tensor:
    """(q * scale[:, None]) @ (weight_q * weight_scale[:, None]).T + bias.

    In fp8 where `fp8_available(device)`, the result is bf16 and K and N are multiples of 16. Elsewhere the
    same numbers are multiplied in fp32 (float64 for a result in float64), which is exact but not fast. There
    is no gradient.

    Args:
        q: [T, K] float8_e4m3fn, from `layer_norm_quantize`, `gelu_quantize` or `quantize_rows_`.
        scale: [T] fp32.
        weight_q: [N, K] float8_e4m3fn.
        weight_scale: [N] fp32.
        bias: [N] floating point, or None; in fp8 it is rounded to bf16.
        out_dtype: of the result.

    Returns:
        [T, N] in out_dtype.

    Raises:
        ValueError: on a wrong shape, dtype or device.
    """
    for name, codes, of in (("q", q, "[T, K]"), ("weight_q", weight_q, "[N, K]")):
        require(
            codes.ndim == 2 and codes.dtype == _FP8,
            f"{name} must be {of} in float8_e4m3fn, got {shape_of(codes)}",
        )
    require(
        q.shape[1] == weight_q.shape[1],
        lambda: f"q and weight_q must agree in K, got {shape_of(q)} and {shape_of(weight_q)}",
    )
    for name, tensor, codes, of in (
        ("scale", scale, q, "[T]"),
        ("weight_scale", weight_scale, weight_q, "[N]"),
    ):
        require(
            tensor.dtype == torch.float32 and tensor.shape == codes.shape[:1],
            f"{name} must be {of} = [{codes.shape[0]}] in float32, got {shape_of(tensor)}",
        )
    if bias is not None:
        require(
            bias.shape == weight_q.shape[:1],
            lambda: f"bias must be [N] = [{weight_q.shape[0]}], got {shape_of(bias)}",
        )
        require_float("bias", bias)
    require(out_dtype in _OUT_DTYPES, lambda: f"out_dtype must be floating point, got {out_dtype}")
    require_same_device(q=q, scale=scale, weight_q=weight_q, weight_scale=weight_scale, bias=bias)
    return torch.ops.fastjepa.fp8_linear(q, scale, weight_q, weight_scale, bias, out_dtype)
