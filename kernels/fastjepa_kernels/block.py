"""A pre-norm transformer block with its backward pass written out: no kernel that a fused one could spare.

    total = x + delta                     the residual stream, and what the block before adds to it
    qkv   = linear(norm1(total))          `add_norm_linear`
    y     = total + proj(attention(qkv))
    added = fc2(gelu(fc1(norm2(y))))      `attend_and_feed`; the output is y + added

A block hands on its last sum undone, so that it is made where the next norm reads it. Against autograd over
separate modules each residual sum, each norm's two reductions over tokens and every bias's gradient but one
are taken in a pass that reads the rows anyway; GELU's gradient is written over the one that comes in.

On a GPU the outputs of norms and of GELU are made once more on the way back, in kernels that read their
inputs anyway: of T tokens of width D a block keeps 10 * T * D numbers, not 16.

For one block in bf16 the passes that are neither matrix products nor attention move 90 * T * D bytes: 32 in
the forward pass, 58 in the backward one.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastjepa_kernels import choice
from fastjepa_kernels.attention import MAX_HEAD_DIM
from fastjepa_kernels.checks import (
    FLOAT_DTYPES,
    require,
    require_cu_seqlens,
    require_same_device,
    shape_of,
)
from fastjepa_kernels.column_sums import column_sums, gelu_backward_
from fastjepa_kernels.layer_norm import add_layer_norm, add_layer_norm_backward

Gradients = tuple[Tensor | None, ...]


class Cut(NamedTuple):
    """How a stream of T tokens is cut into sequences; see `packed_attention`."""

    cu_seqlens: Tensor  # int32 [S + 1]
    max_seqlen: int
    equal: bool = False


class Linear(NamedTuple):
    weight: Tensor  # [N, K]
    bias: Tensor  # [N]


class Norm(NamedTuple):
    weight: Tensor  # [D]
    bias: Tensor  # [D]
    eps: float


def _or_remake(made: Tensor) -> Tensor | None:
    """What to keep of what the backward pass can make again: on a CPU making it would cost a pass."""
    return made if made.device.type == "cpu" else None


def _either(kept: Tensor | None, made: Tensor | None) -> Tensor:
    found = made if kept is None else kept
    assert found is not None, "kept or made again"
    return found


def _are_one(one: Tensor, other: Tensor) -> bool:
    """Whether both are the same numbers in memory. Fake tensors and those on "meta" have no memory."""
    if one is other:
        return True
    if type(one) is not Tensor or type(other) is not Tensor or one.is_meta or other.is_meta:
        return False
    return one.data_ptr() == other.data_ptr() and one.stride() == other.stride()


class _AddNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, delta: Tensor | None, weight: Tensor, bias: Tensor, eps: float
    ) -> Tensor:
        ctx.preference = choice.preference()
        total, normed, mean, rstd = add_layer_norm(x, delta, weight, bias, eps, ctx.preference)
        ctx.save_for_backward(total, weight, bias, mean, rstd)
        ctx.has_delta = delta is not None
        return normed

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Gradients:
        total, weight, bias, mean, rstd = ctx.saved_tensors
        arguments = grad, None, total, weight, bias, mean, rstd
        dx, sums, _ = add_layer_norm_backward(*arguments, preference=ctx.preference)
        return dx, dx if ctx.has_delta else None, sums[0], sums[1], None


class _AddNormLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        delta: Tensor | None,
        norm_weight: Tensor,
        norm_bias: Tensor,
        eps: float,
        weight: Tensor,
        bias: Tensor,
    ) -> tuple[Tensor, Tensor]:
        ctx.preference, ctx.eps = choice.preference(), eps
        total, normed, mean, rstd = add_layer_norm(x, delta, norm_weight, norm_bias, eps, ctx.preference)
        ctx.save_for_backward(total, _or_remake(normed), mean, rstd, norm_weight, norm_bias, weight)
        ctx.has_delta = delta is not None
        return total, F.linear(normed, weight, bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, through: Tensor, grad: Tensor) -> Gradients:
        total, normed, mean, rstd, norm_weight, norm_bias, weight = ctx.saved_tensors
        for_x, for_delta, for_norm, for_norm_bias, _, for_weight, for_bias = ctx.needs_input_grad
        remake = for_weight and normed is None
        dx = dnorm = dnorm_bias = dweight = again = None
        if for_x or for_delta or for_norm or for_norm_bias:
            norm = norm_weight, norm_bias, mean, rstd
            dx, sums, again = add_layer_norm_backward(
                grad @ weight, through, total, *norm, remake=remake, preference=ctx.preference
            )
            dnorm, dnorm_bias = sums[0], sums[1]
        elif remake:
            again = add_layer_norm(total, None, norm_weight, norm_bias, ctx.eps, ctx.preference)[1]
        if for_weight:
            dweight = grad.t() @ _either(normed, again)
        dbias = column_sums(grad, ctx.preference) if for_bias else None
        return dx, dx if ctx.has_delta else None, dnorm, dnorm_bias, None, dweight, dbias


class _AttendAndFeed(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        total: Tensor,
        qkv: Tensor,
        rows: Tensor | None,
        cu_seqlens: Tensor,
        max_seqlen: int,
        equal: bool,
        heads: int,
        proj_weight: Tensor,
        proj_bias: Tensor,
        norm_weight: Tensor,
        norm_bias: Tensor,
        eps: float,
        fc1_weight: Tensor,
        fc1_bias: Tensor,
        fc2_weight: Tensor,
        fc2_bias: Tensor,
    ) -> tuple[Tensor, Tensor]:
        tokens, width = total.shape
        parts = qkv.view(tokens, 3, heads, width // heads)
        scale, preference = (width // heads) ** -0.5, choice.preference()
        out, lse = torch.ops.fastjepa.packed_attention(
            parts, cu_seqlens, max_seqlen, scale, preference, equal
        )
        attended = out.view(tokens, width)
        if rows is not None:  # [R, D] from here on
            attended, total = attended.index_select(0, rows), total.index_select(0, rows)
        y, normed, mean, rstd = add_layer_norm(
            total, F.linear(attended, proj_weight, proj_bias), norm_weight, norm_bias, eps, preference
        )
        hidden = F.linear(normed, fc1_weight, fc1_bias)
        active = F.gelu(hidden)
        ctx.save_for_backward(
            parts, out, lse, attended, y, _or_remake(normed), mean, rstd, hidden, _or_remake(active), rows,
            cu_seqlens, proj_weight, norm_weight, norm_bias, fc1_weight, fc2_weight,
        )  # fmt: skip
        ctx.max_seqlen, ctx.scale, ctx.preference, ctx.eps = max_seqlen, scale, preference, eps
        return y, F.linear(active, fc2_weight, fc2_bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, through: Tensor, grad: Tensor) -> Gradients:
        (
            parts, out, lse, attended, y, normed, mean, rstd, hidden, active, rows,
            cu_seqlens, proj_weight, norm_weight, norm_bias, fc1_weight, fc2_weight,
        ) = ctx.saved_tensors  # fmt: skip
        needed, preference = ctx.needs_input_grad, ctx.preference
        for_total, for_qkv = needed[:2]
        for_proj, for_proj_bias, for_norm, for_norm_bias, _, for_fc1, for_fc1_bias, for_fc2, for_fc2_bias = (
            needed[7:]
        )
        # What is wanted from there on back, of the sum y, of norm2 and of GELU.
        from_y = for_total or for_qkv or for_proj or for_proj_bias
        from_norm = from_y or for_norm or for_norm_bias
        from_gelu = from_norm or for_fc1 or for_fc1_bias
        norm = norm_weight, norm_bias
        dy: Any = None
        sums: Any = None
        dqkv = dattended = dproj = dfc1 = dfc1_bias = dfc2 = dfc2_bias = None

        remake, again = for_fc2 and active is None, None
        if from_gelu:
            dhidden = grad @ fc2_weight
            dfc1_bias, again = gelu_backward_(dhidden, hidden, remake, preference)  # now of fc1's output
        elif remake:
            again = F.gelu(hidden)
        if for_fc2:
            dfc2 = grad.t() @ _either(active, again)

        remake, again = for_fc1 and normed is None, None
        if from_norm:
            dy, sums, again = add_layer_norm_backward(
                dhidden @ fc1_weight, through, y, *norm, mean, rstd, remake=remake, preference=preference
            )
        elif remake:
            again = add_layer_norm(y, None, *norm, ctx.eps, preference)[1]
        if for_fc1:
            dfc1 = dhidden.t() @ _either(normed, again)
        if for_fc2_bias:
            # What follows the block gives both outputs one and the same gradient.
            passed = sums is not None and _are_one(through, grad)
            dfc2_bias = sums[2] if passed else column_sums(grad, preference)

        if for_proj:
            dproj = dy.t() @ attended
        if for_qkv:
            dattended = dy @ proj_weight
        if rows is not None and (for_total or for_qkv):
            whole = dy.new_zeros(for_total + for_qkv, parts.shape[0], y.shape[1])
            if for_total:
                dy = whole[-1].index_copy_(0, rows, dy)
            if for_qkv:
                dattended = whole[0].index_copy_(0, rows, dattended)
        if dattended is not None:
            dqkv = torch.ops.fastjepa.packed_attention_backward(
                dattended.view(out.shape), parts, out, lse, cu_seqlens, ctx.max_seqlen, ctx.scale, preference
            ).flatten(1)
        dnorm, dnorm_bias, dproj_bias = (None,) * 3 if sums is None else (sums[0], sums[1], sums[3])
        return (
            dy if for_total else None, dqkv, None, None, None, None, None,
            dproj, dproj_bias, dnorm, dnorm_bias, None, dfc1, dfc1_bias, dfc2, dfc2_bias,
        )  # fmt: skip


_Expected = tuple[str, Tensor, tuple[int, ...]]


def _require(like: Tensor, *expected: _Expected) -> None:
    """One dtype and one device, those of the stream. It runs for each block, so it takes microseconds."""
    dtype, device = like.dtype, like.device
    for name, tensor, shape in expected:
        if tensor.shape != shape or tensor.dtype is not dtype or tensor.device != device:
            allowed = f"{list(shape)} {str(dtype).removeprefix('torch.')} on {device}"
            raise ValueError(f"{name} must be {allowed}, got {shape_of(tensor)}")


def _require_stream(name: str, x: Tensor) -> None:
    require(
        x.ndim == 2 and x.dtype in FLOAT_DTYPES,
        lambda: f"{name} must be floating point [T, D], got {shape_of(x)}",
    )


def _outputs(linear: Linear) -> int:
    return linear.weight.shape[0] if linear.weight.ndim else 0


def _require_cut(cut: Cut, tokens: int) -> None:
    cu_seqlens, max_seqlen, equal = cut
    require_cu_seqlens(cu_seqlens)
    require(max_seqlen >= 0, lambda: f"max_seqlen must be 0 or more, got {max_seqlen}")
    sequences = cu_seqlens.numel() - 1
    require(
        not equal or tokens == sequences * max_seqlen,
        lambda: f"{sequences} sequences of equal length {max_seqlen} do not fill {tokens} tokens",
    )


def add_norm(x: Tensor, delta: Tensor | None, norm: Norm) -> Tensor:
    """layer_norm(x + delta): [T, D] of [T, D] each; `delta` may be None. Once differentiable.

    Raises:
        ValueError: on a wrong shape, or another dtype or device than that of `x`.
    """
    _require_stream("x", x)
    width = x.shape[1:]
    _require(x, ("norm.weight", norm.weight, width), ("norm.bias", norm.bias, width))
    if delta is not None:
        _require(x, ("delta", delta, x.shape))
    normed: Tensor = _AddNorm.apply(x, delta, *norm)
    return normed


def add_norm_linear(x: Tensor, delta: Tensor | None, norm: Norm, linear: Linear) -> tuple[Tensor, Tensor]:
    """x + delta [T, D] and linear(layer_norm(x + delta)) [T, N]; `delta` may be None. Once differentiable.

    Raises:
        ValueError: as from `add_norm`.
    """
    _require_stream("x", x)
    (_, width), outputs = x.shape, _outputs(linear)
    _require(
        x,
        ("norm.weight", norm.weight, (width,)),
        ("norm.bias", norm.bias, (width,)),
        ("linear.weight", linear.weight, (outputs, width)),
        ("linear.bias", linear.bias, (outputs,)),
    )
    if delta is not None:
        _require(x, ("delta", delta, x.shape))
    total, out = _AddNormLinear.apply(x, delta, *norm, *linear)
    return total, out


def attend_and_feed(
    total: Tensor,
    qkv: Tensor,
    cut: Cut,
    heads: int,
    proj: Linear,
    norm: Norm,
    fc1: Linear,
    fc2: Linear,
    rows: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The rest of a block, from the residual stream [T, D] and qkv [T, 3 D].

    Args:
        heads: of D / heads numbers each, a multiple of 8 up to 128.
        rows: int64 [R], which rows of the stream go on after the attention, each once where a gradient is
            wanted; None for all.

    Returns:
        y and what is to be added to it, [T, D] or [R, D] each. Once differentiable.

    Raises:
        ValueError: on a wrong shape or head dim, another dtype or device than that of `total`, and for `cut`
            as from `packed_attention`.
    """
    _require_stream("total", total)
    (tokens, width), hidden = total.shape, _outputs(fc1)
    require(
        heads > 0 and width % heads == 0 and width // heads % 8 == 0 and width // heads <= MAX_HEAD_DIM,
        lambda: f"width / heads must be a multiple of 8 up to {MAX_HEAD_DIM}, got {width} / {heads}",
    )
    _require(
        total,
        ("qkv", qkv, (tokens, 3 * width)),
        ("proj.weight", proj.weight, (width, width)),
        ("proj.bias", proj.bias, (width,)),
        ("norm.weight", norm.weight, (width,)),
        ("norm.bias", norm.bias, (width,)),
        ("fc1.weight", fc1.weight, (hidden, width)),
        ("fc1.bias", fc1.bias, (hidden,)),
        ("fc2.weight", fc2.weight, (width, hidden)),
        ("fc2.bias", fc2.bias, (width,)),
    )
    _require_cut(cut, tokens)
    if cut.cu_seqlens.device != total.device or (rows is not None and rows.device != total.device):
        require_same_device(total=total, cu_seqlens=cut.cu_seqlens, rows=rows)
    if rows is not None:
        require(
            rows.ndim == 1 and rows.dtype == torch.int64,
            lambda: f"rows must be int64 [R], got {shape_of(rows)}",
        )
    y, added = _AttendAndFeed.apply(total, qkv, rows, *cut, heads, *proj, *norm, *fc1, *fc2)
    return y, added


__all__ = ["Cut", "Linear", "Norm", "add_norm", "add_norm_linear", "attend_and_feed"]
