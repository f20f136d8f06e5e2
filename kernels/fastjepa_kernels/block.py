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

For one block in bf16 the passes that are neither matrix products nor attention move about 94 * T * D bytes:
32 in the forward pass, 62 in the backward one.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastjepa_kernels import choice
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
        dx, sums, _ = add_layer_norm_backward(grad, None, *ctx.saved_tensors, preference=ctx.preference)
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
        ctx.preference = choice.preference()
        total, normed, mean, rstd = add_layer_norm(x, delta, norm_weight, norm_bias, eps, ctx.preference)
        ctx.save_for_backward(total, _or_remake(normed), mean, rstd, norm_weight, norm_bias, weight)
        ctx.has_delta = delta is not None
        return total, F.linear(normed, weight, bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, through: Tensor, grad: Tensor) -> Gradients:
        total, normed, mean, rstd, norm_weight, norm_bias, weight = ctx.saved_tensors
        norm = norm_weight, norm_bias, mean, rstd
        dx, sums, again = add_layer_norm_backward(
            grad @ weight, through, total, *norm, remake=normed is None, preference=ctx.preference
        )
        dweight = grad.t() @ _either(normed, again)
        return (
            dx,
            dx if ctx.has_delta else None,
            sums[0],
            sums[1],
            None,
            dweight,
            column_sums(grad, ctx.preference),
        )


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
        ctx.max_seqlen, ctx.scale, ctx.preference = max_seqlen, scale, preference
        return y, F.linear(active, fc2_weight, fc2_bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, through: Tensor, grad: Tensor) -> Gradients:
        (
            parts, out, lse, attended, y, normed, mean, rstd, hidden, active, rows,
            cu_seqlens, proj_weight, norm_weight, norm_bias, fc1_weight, fc2_weight,
        ) = ctx.saved_tensors  # fmt: skip
        tokens, width = parts.shape[0], y.shape[1]
        dhidden = grad @ fc2_weight
        dfc1_bias, again = gelu_backward_(
            dhidden, hidden, active is None, ctx.preference
        )  # now of fc1's output
        dfc2_weight = grad.t() @ _either(active, again)
        norm = norm_weight, norm_bias, mean, rstd
        dnormed = dhidden @ fc1_weight
        dy, sums, again = add_layer_norm_backward(
            dnormed, through, y, *norm, remake=normed is None, preference=ctx.preference
        )
        dfc1_weight = dhidden.t() @ _either(normed, again)
        # What follows the block gives both outputs one and the same gradient.
        same = through.data_ptr() == grad.data_ptr() and through.stride() == grad.stride()
        dfc2_bias = sums[2] if same else column_sums(grad, ctx.preference)
        dproj_weight = dy.t() @ attended
        dattended = dy @ proj_weight
        if rows is not None:
            whole = dy.new_zeros(2, tokens, width)
            dattended, dy = whole[0].index_copy_(0, rows, dattended), whole[1].index_copy_(0, rows, dy)
        dqkv = torch.ops.fastjepa.packed_attention_backward(
            dattended.view(out.shape), parts, out, lse, cu_seqlens, ctx.max_seqlen, ctx.scale, ctx.preference
        )
        return (
            dy, dqkv.view(tokens, 3 * width), None, None, None, None, None,
            dproj_weight, sums[3], sums[0], sums[1], None, dfc1_weight, dfc1_bias, dfc2_weight, dfc2_bias,
        )  # fmt: skip


def add_norm(x: Tensor, delta: Tensor | None, norm: Norm) -> Tensor:
    """layer_norm(x + delta): [T, D] of [T, D] each; `delta` may be None. Once differentiable."""
    normed: Tensor = _AddNorm.apply(x, delta, *norm)
    return normed


def add_norm_linear(x: Tensor, delta: Tensor | None, norm: Norm, linear: Linear) -> tuple[Tensor, Tensor]:
    """x + delta [T, D] and linear(layer_norm(x + delta)) [T, N]; `delta` may be None. Once differentiable."""
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
        rows: int64 [R], which rows of the stream go on after the attention, each once where a gradient is
            wanted; None for all.

    Returns:
        y and what is to be added to it, [T, D] or [R, D] each. Once differentiable.
    """
    y, added = _AttendAndFeed.apply(total, qkv, rows, *cut, heads, *proj, *norm, *fc1, *fc2)
    return y, added


__all__ = ["Cut", "Linear", "Norm", "add_norm", "add_norm_linear", "attend_and_feed"]
