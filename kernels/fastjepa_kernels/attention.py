"""packed_attention: self-attention over many short sequences laid end to end.

For each sequence and head: softmax(scale * q k^T) v, with q, k, v read from one packed tensor.

Bytes that must move: qkv in and o out, 4 * T * H * d elements; backward qkv, o and its gradient in and the
gradient of qkv out, 8 * T * H * d. With sequences of 60 to 225 tokens the arithmetic intensity is about
L / 2 FLOP per byte, so bytes decide, not FLOPs. Besides o the forward pass leaves lse, a number per head and
token: the logarithm of the sum of exp(scale * score), from which the backward pass makes the softmax again.
"""

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from fastjepa_kernels import attention_stock as stock
from fastjepa_kernels import attention_triton_backward, attention_triton_forward, choice
from fastjepa_kernels.attention_padded import Padding
from fastjepa_kernels.checks import (
    require,
    require_cu_seqlens,
    require_cu_seqlens_values,
    require_float,
    require_same_device,
    shape_of,
    values_are_checked,
)
from fastjepa_kernels.choice import Way, Ways
from fastjepa_kernels.gradients import refuse_double_backward, refuse_forward_mode
from fastjepa_kernels.ops import op

MAX_HEAD_DIM = 128

# ------------------------------------------------------------------------------------- plain torch


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _reference(
    qkv: Tensor, cu_seqlens: Tensor, max_seqlen: int, scale: float, equal: bool = False
) -> tuple[Tensor, Tensor]:
    """Pads every sequence to the bound, and attends under a mask of keys."""
    padding = Padding.of(cu_seqlens, qkv.shape[0], max_seqlen)
    q, k, v = padding.pad(qkv).to(_wide(qkv.dtype)).permute(2, 0, 3, 1, 4)  # [S, H, L, d] each
    scores = (q @ k.mT * scale).masked_fill_(~padding.keys, -torch.inf)  # [S, H, L, L]
    lse = scores.logsumexp(-1)  # [S, H, L]
    out = scores.sub_(lse[..., None]).exp_() @ v
    return padding.unpad(out.transpose(1, 2)).to(qkv.dtype), padding.unpad(lse.mT).t().contiguous()


def _reference_backward(
    dout: Tensor, qkv: Tensor, out: Tensor, lse: Tensor, cu_seqlens: Tensor, max_seqlen: int, scale: float
) -> Tensor:
    padding = Padding.of(cu_seqlens, qkv.shape[0], max_seqlen)
    wide = _wide(qkv.dtype)
    q, k, v = padding.pad(qkv).to(wide).permute(2, 0, 3, 1, 4)  # [S, H, L, d] each
    dout, out = (padding.pad(x).to(wide).transpose(1, 2) for x in (dout, out))  # [S, H, L, d]
    p = q @ k.mT * scale - padding.pad(lse.t()).mT[..., None]  # [S, H, L, L]
    p = p.masked_fill_(~padding.keys, -torch.inf).exp_()
    ds = p * (dout @ v.mT - (dout * out).sum(-1, keepdim=True)) * scale
    gradients = torch.stack([ds @ k, ds.mT @ q, p.mT @ dout])  # [3, S, H, L, d]
    return padding.unpad(gradients.permute(1, 3, 0, 2, 4)).to(qkv.dtype)


# --------------------------------------------------------------------------------------------- C++

# Of the extension's sequences, whose scores it holds whole: longer ones gain from torch's tiles.
_LONGEST = 200


def _cpp(
    qkv: Tensor, cu_seqlens: Tensor, _max_seqlen: int, scale: float, _equal: bool = False
) -> tuple[Tensor, Tensor]:
    out: tuple[Tensor, Tensor] = torch.ops.fastjepa_native.packed_attention(qkv, cu_seqlens, scale)
    return out


def _cpp_backward(
    dout: Tensor, qkv: Tensor, out: Tensor, lse: Tensor, cu_seqlens: Tensor, _max_seqlen: int, scale: float
) -> Tensor:
    dqkv: Tensor = torch.ops.fastjepa_native.packed_attention_backward(dout, qkv, out, lse, cu_seqlens, scale)
    return dqkv


def _takes_cpp(qkv: Tensor, _cu_seqlens: Tensor, max_seqlen: int, *_rest: Any) -> bool:
    return qkv.dtype == torch.float32 and qkv.shape[-1] % 16 == 0 and max_seqlen <= _LONGEST


def _takes_cpp_backward(dout: Tensor, qkv: Tensor, *rest: Any) -> bool:
    return dout.dtype == torch.float32 and _takes_cpp(qkv, *rest[2:])


# -------------------------------------------------------------------------------- op and gradient


def _takes_triton(x: Tensor, *_rest: Any) -> bool:
    return x.dtype != torch.float64


def _takes_triton_backward(x: Tensor, *_rest: Any) -> bool:
    # In fp32 no matrix instructions are used, and rows of more than 64 numbers do not fit into registers.
    return x.element_size() == 2 or (x.dtype == torch.float32 and x.shape[-1] <= 64)


def _size(qkv: Tensor, _cu_seqlens: Tensor, max_seqlen: int, *_rest: Any) -> tuple[int, ...]:
    """Of one program's work: head dim and longest sequence."""
    return qkv.shape[-1], max_seqlen


def _size_backward(dout: Tensor, *rest: Any) -> tuple[int, ...]:
    return dout.shape[-1], rest[-2]


_WAYS = Ways(
    "packed_attention",
    Way("triton", attention_triton_forward.attention, takes=_takes_triton),
    Way("cudnn", stock.cudnn, takes=stock.takes_cudnn),
    Way("varlen", stock.varlen, takes=stock.takes_varlen),
    Way("fa2", stock.fa2, takes=stock.takes_half, installed=stock.fa2_installed),
    Way("fa4", stock.fa4, takes=stock.takes_fa4, installed=stock.fa4_installed),
    Way("cpp", _cpp, takes=_takes_cpp),
    Way("sdpa", stock.sdpa, takes=stock.takes_sdpa),
    Way("torch", _reference),
    size=_size,
)
_BACKWARD_WAYS = Ways(
    "packed_attention_backward",
    Way("triton", attention_triton_backward.attention_backward, takes=_takes_triton_backward),
    Way("varlen", stock.varlen_backward, takes=stock.takes_varlen),
    Way("fa2", stock.fa2_backward, takes=stock.takes_half, installed=stock.fa2_installed),
    Way("fa4", stock.fa4_backward, takes=stock.takes_fa4, installed=stock.fa4_installed),
    Way("cpp", _cpp_backward, takes=_takes_cpp_backward),
    Way("sdpa", stock.sdpa_backward, takes=stock.takes_sdpa),
    Way("torch", _reference_backward),
    size=_size_backward,
)


@op("fastjepa::packed_attention")
def _packed_attention(
    qkv: Tensor, cu_seqlens: Tensor, max_seqlen: int, scale: float, preference: str, equal: bool = False
) -> tuple[Tensor, Tensor]:
    """out [T, H, d] and lse [H, T], both zero past the end."""
    tokens, _, heads, head_dim = qkv.shape
    require_cu_seqlens_values(cu_seqlens, tokens, max_seqlen)
    if equal and values_are_checked(cu_seqlens):
        lengths = cu_seqlens.diff().tolist()
        require(set(lengths) <= {max_seqlen}, lambda: f"not all of equal length {max_seqlen}: {lengths[:8]}")
    if tokens == 0 or cu_seqlens.numel() == 1 or max_seqlen == 0:
        return qkv.new_zeros(tokens, heads, head_dim), qkv.new_zeros(heads, tokens, dtype=_wide(qkv.dtype))
    return _WAYS(preference, qkv.device, qkv, cu_seqlens, max_seqlen, scale, equal)


@_packed_attention.register_fake
def _(
    qkv: Tensor, cu_seqlens: Tensor, max_seqlen: int, scale: float, preference: str, equal: bool = False
) -> tuple[Tensor, Tensor]:
    tokens, _, heads, head_dim = qkv.shape
    return qkv.new_empty(tokens, heads, head_dim), qkv.new_empty(heads, tokens, dtype=_wide(qkv.dtype))


@op("fastjepa::packed_attention_backward")
def _packed_attention_backward(
    dout: Tensor,
    qkv: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    scale: float,
    preference: str,
) -> Tensor:
    """dqkv [T, 3, H, d], zero past the end. Of cu_seqlens that the forward pass has checked."""
    if qkv.shape[0] == 0 or cu_seqlens.numel() == 1 or max_seqlen == 0:
        return qkv.new_zeros(qkv.shape)
    return _BACKWARD_WAYS(preference, qkv.device, dout, qkv, out, lse, cu_seqlens, max_seqlen, scale)


@_packed_attention_backward.register_fake
def _(
    dout: Tensor,
    qkv: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    scale: float,
    preference: str,
) -> Tensor:
    return qkv.new_empty(qkv.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    qkv, cu_seqlens, ctx.max_seqlen, ctx.scale, ctx.preference, *_ = inputs
    out, lse = output
    ctx.save_for_backward(qkv, out, lse, cu_seqlens)
    ctx.mark_non_differentiable(lse)
    ctx.set_materialize_grads(False)  # there would be zeros for lse each time


def _backward(ctx: Any, dout: Tensor | None, _dlse: None) -> tuple[Tensor | None, ...]:
    if dout is None:
        return (None,) * 6
    dqkv = torch.ops.fastjepa.packed_attention_backward(
        dout, *ctx.saved_tensors, ctx.max_seqlen, ctx.scale, ctx.preference
    )
    return dqkv, None, None, None, None, None


_packed_attention.register_autograd(_backward, setup_context=_save)
refuse_double_backward(_packed_attention_backward, "packed_attention")


def _sum_of_squares(cu_seqlens: Tensor, max_seqlen: int) -> int:
    """Of the lengths; of their bound where there are no values: on the device "meta" and of a fake tensor."""
    if type(cu_seqlens) is Tensor and cu_seqlens.device.type != "meta":
        return sum(length**2 for length in cu_seqlens.diff().tolist())
    return (cu_seqlens.numel() - 1) * max_seqlen**2


@register_flop_formula(torch.ops.fastjepa.packed_attention, get_raw=True)
def _flop(qkv: Tensor, cu_seqlens: Tensor, max_seqlen: int, *_rest: Any, **_keywords: Any) -> int:
    return 4 * qkv.shape[2] * qkv.shape[3] * _sum_of_squares(cu_seqlens, max_seqlen)


@register_flop_formula(torch.ops.fastjepa.packed_attention_backward, get_raw=True)
def _backward_flop(
    _dout: Tensor,
    qkv: Tensor,
    _out: Tensor,
    _lse: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    *_rest: Any,
    **_keywords: Any,
) -> int:
    return 10 * qkv.shape[2] * qkv.shape[3] * _sum_of_squares(cu_seqlens, max_seqlen)


# ---------------------------------------------------------------------------------------- for users


def packed_attention(
    qkv: Tensor, cu_seqlens: Tensor, max_seqlen: int, scale: float | None = None, *, equal: bool = False
) -> Tensor:
    """Attend within each sequence of a packed stream.

    Args:
        qkv: [T, 3, H, d] floating point, any strides; d a multiple of 8 up to 128.
        cu_seqlens: int32 [S + 1] on the device of `qkv`; sequences may be empty.
        max_seqlen: an upper bound of the lengths, known on the host.
        scale: of the scores; 1 / sqrt(d) by default.
        equal: the caller's word that every sequence has max_seqlen tokens and that they fill the stream, so
            that dense kernels may serve; nothing on a GPU can tell without waiting for it.

    Returns:
        [T, H, d]. Rows past cu_seqlens[-1] are zero, and so are their gradients. Once differentiable.

    Raises:
        ValueError: on a wrong shape, dtype, device or head dim; on the CPU also for cu_seqlens that do
            not start at 0, decrease or pass T, for a sequence longer than max_seqlen, and for `equal`
            where they are not; T must be S * max_seqlen then on any device. On a GPU the values are looked
            at under FASTJEPA_DEBUG=1; without it nothing outside the tensors is touched, and what comes out
            of such a call means nothing.
        NotImplementedError: in forward-mode differentiation, or at a second derivative.
    """
    require(qkv.ndim == 4 and qkv.shape[1] == 3, lambda: f"qkv must be [T, 3, H, d], got {shape_of(qkv)}")
    require_float("qkv", qkv)
    refuse_forward_mode("packed_attention", qkv)
    require_same_device(qkv=qkv, cu_seqlens=cu_seqlens)
    head_dim = qkv.shape[3]
    require(
        head_dim % 8 == 0 and 0 < head_dim <= MAX_HEAD_DIM,
        lambda: f"head dim must be a multiple of 8 up to {MAX_HEAD_DIM}, got {head_dim}",
    )
    require(max_seqlen >= 0, lambda: f"max_seqlen must be 0 or more, got {max_seqlen}")
    require_cu_seqlens(cu_seqlens)
    tokens, sequences = qkv.shape[0], cu_seqlens.numel() - 1
    require(
        not equal or tokens == sequences * max_seqlen,
        lambda: f"{sequences} sequences of equal length {max_seqlen} do not fill {tokens} tokens",
    )
    scale = head_dim**-0.5 if scale is None else float(scale)
    out, _ = torch.ops.fastjepa.packed_attention(
        qkv, cu_seqlens, max_seqlen, scale, choice.preference(), equal
    )
    return out
