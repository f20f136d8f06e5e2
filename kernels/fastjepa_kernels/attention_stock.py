"""packed_attention by other people's kernels: torch's own, and flash-attn 2 and 4 where they are installed.

All have the same two signatures, and the same meaning of lse: the natural logarithm of the sum of
exp(scale * score), [H, T]. So one may run forward and another backward.
"""

from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from itertools import groupby
from operator import sub
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastjepa_kernels.attention_padded import Padding
from fastjepa_kernels.language import architecture
from fastjepa_kernels.sequences import rows_in_sequences

aten = torch.ops.aten


def _rows_dense(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


# --------------------------------------------------------------------------------------- torch's SDPA


def sdpa(
    qkv: Tensor, cu_seqlens: Tensor, max_seqlen: int, scale: float, equal: bool = False
) -> tuple[Tensor, Tensor]:
    run = _sdpa_in_runs if qkv.device.type == "cpu" else _sdpa_padded
    return run(_rows_dense(qkv), cu_seqlens, max_seqlen, scale)


def sdpa_backward(
    dout: Tensor, qkv: Tensor, out: Tensor, lse: Tensor, cu_seqlens: Tensor, max_seqlen: int, scale: float
) -> Tensor:
    run = _sdpa_in_runs_backward if qkv.device.type == "cpu" else _sdpa_padded_backward
    return run(_rows_dense(dout), _rows_dense(qkv), out, lse, cu_seqlens, max_seqlen, scale)


def takes_sdpa(x: Tensor, *_rest: Any) -> bool:
    return x.device.type == "cpu" or (x.device.type == "cuda" and x.dtype != torch.float64)


def _runs(cu_seqlens: Tensor) -> Iterator[tuple[slice, tuple[int, int]]]:
    """Rows and [number, length] of sequences of one length that follow each other: each a dense batch."""
    starts = cu_seqlens.tolist()
    first = 0
    for length, group in groupby(map(sub, starts[1:], starts)):
        count = len(list(group))
        last = first + count * length
        if last > first:
            yield slice(first, last), (count, length)
        first = last


def _batch(rows: Tensor, shape: tuple[int, int]) -> Tensor:
    """[count * length, H, d] as [count, H, length, d], in place."""
    return rows.view(*shape, *rows.shape[1:]).transpose(1, 2)


def _parts(rows: Tensor, shape: tuple[int, int]) -> Sequence[Tensor]:
    """[count * length, 3, H, d] as three of [count, H, length, d], in place."""
    return rows.view(*shape, *rows.shape[1:]).permute(2, 0, 3, 1, 4).unbind()


def _sdpa_in_runs(qkv: Tensor, cu_seqlens: Tensor, _max_seqlen: int, scale: float) -> tuple[Tensor, Tensor]:
    """A call for each run, on views: without padding, and for equal lengths without a copy."""
    tokens, _, heads, head_dim = qkv.shape
    outs, lses, left = [], [], tokens
    for rows, shape in _runs(cu_seqlens):
        out, lse = aten._scaled_dot_product_flash_attention_for_cpu(*_parts(qkv[rows], shape), scale=scale)
        outs.append(out.transpose(1, 2).reshape(-1, heads, head_dim))
        lses.append(lse.transpose(0, 1).reshape(heads, -1))
        left -= outs[-1].shape[0]
    if left > 0:
        outs.append(qkv.new_zeros(left, heads, head_dim))
        lses.append(qkv.new_zeros(heads, left, dtype=torch.promote_types(qkv.dtype, torch.float32)))
    if len(outs) == 1:
        return outs[0], lses[0].contiguous()
    return torch.cat(outs), torch.cat(lses, dim=1)


def _sdpa_in_runs_backward(
    dout: Tensor, qkv: Tensor, out: Tensor, lse: Tensor, cu_seqlens: Tensor, _max_seqlen: int, scale: float
) -> Tensor:
    dqkv = qkv.new_empty(qkv.shape)
    # In two bytes a number torch's kernel takes 2 to 19 times as long, and in fp32 it loses less.
    wide = torch.promote_types(qkv.dtype, torch.float32)
    dout, qkv, out = dout.to(wide), qkv.to(wide), out.to(wide)
    end = 0
    for rows, shape in _runs(cu_seqlens):
        gradients = aten._scaled_dot_product_flash_attention_for_cpu_backward(
            _batch(dout[rows], shape), *_parts(qkv[rows], shape), _batch(out[rows], shape),
            lse[:, rows].view(-1, *shape).transpose(0, 1), 0.0, False, scale=scale,
        )  # fmt: skip
        to = dqkv[rows].view(*shape, *dqkv.shape[1:])  # [count, length, 3, H, d]
        for part, gradient in zip(to.unbind(2), gradients, strict=True):
            part.copy_(gradient.transpose(1, 2))
        end = rows.stop
    dqkv[end:] = 0
    return dqkv


def _padding_and_bias(qkv: Tensor, cu_seqlens: Tensor, max_seqlen: int) -> tuple[Padding, Tensor]:
    """Lengths are multiples of 32, for the alignment that the kernel wants of its bias and its lse."""
    length = -(-max_seqlen // 32) * 32
    padding = Padding.of(cu_seqlens, qkv.shape[0], length)
    bias = torch.zeros_like(padding.keys, dtype=qkv.dtype).masked_fill_(~padding.keys, -torch.inf)
    return padding, bias.expand(-1, qkv.shape[2], length, -1)


def _sdpa_padded(qkv: Tensor, cu_seqlens: Tensor, max_seqlen: int, scale: float) -> tuple[Tensor, Tensor]:
    padding, bias = _padding_and_bias(qkv, cu_seqlens, max_seqlen)
    q, k, v = padding.pad(qkv).permute(2, 0, 3, 1, 4)  # [S, H, L, d] each
    out, lse, *_ = aten._scaled_dot_product_efficient_attention(q, k, v, bias, True, scale=scale)
    return padding.unpad(out.transpose(1, 2)), padding.unpad(lse.transpose(1, 2)).t().contiguous()


def _sdpa_padded_backward(
    dout: Tensor, qkv: Tensor, out: Tensor, lse: Tensor, cu_seqlens: Tensor, max_seqlen: int, scale: float
) -> Tensor:
    padding, bias = _padding_and_bias(qkv, cu_seqlens, max_seqlen)
    q, k, v = padding.pad(qkv).permute(2, 0, 3, 1, 4)  # [S, H, L, d] each
    undropped = torch.empty((), dtype=torch.int64, device=qkv.device)  # a state that only dropout reads
    *gradients, _ = aten._scaled_dot_product_efficient_attention_backward(
        padding.pad(dout).transpose(1, 2), q, k, v, bias, padding.pad(out).transpose(1, 2),
        padding.pad(lse.t()).transpose(1, 2).contiguous(), undropped, undropped, 0.0,
        [True, True, True, False], scale=scale,
    )  # fmt: skip
    return torch.stack([padding.unpad(gradient.transpose(1, 2)) for gradient in gradients], dim=1)


# ------------------------------------------------------------------- dense, of one length, on NVIDIA's GPUs


def takes_cudnn(qkv: Tensor, *rest: Any) -> bool:
    # cuDNN's stream of heads must start on 16 bytes; its graphs for Hopper take heads of up to 128.
    return takes_half(qkv) and torch.version.hip is None and rest[-1] is True


def cudnn(
    qkv: Tensor, cu_seqlens: Tensor, max_seqlen: int, scale: float, equal: bool = True
) -> tuple[Tensor, Tensor]:
    """On views of the stream: no padding, no copy. Only for sequences that are equal."""
    query, key, value = _parts(_rows_dense(qkv), (cu_seqlens.numel() - 1, max_seqlen))
    out, lse, *_ = aten._scaled_dot_product_cudnn_attention(query, key, value, None, True, scale=scale)
    heads = qkv.shape[2]
    rows = out.transpose(1, 2).reshape(-1, heads, qkv.shape[3])  # [T, H, d]
    return rows, lse.reshape(-1, heads, max_seqlen).transpose(0, 1).reshape(heads, -1)


# ---------------------------------------------------------- kernels that take packed sequences, on a GPU


def _past_the_end(cu_seqlens: Tensor, tokens: int) -> Tensor:
    return ~rows_in_sequences(cu_seqlens, tokens)


def _ended(out: Tensor, lse: Tensor, cu_seqlens: Tensor) -> tuple[Tensor, Tensor]:
    """With zeros past the end, which these kernels do not write."""
    past = _past_the_end(cu_seqlens, len(out))
    return out.masked_fill_(past[:, None, None], 0), lse.masked_fill_(past, 0)


def _within(cu_seqlens: Tensor, tokens: int) -> Tensor:
    """Starts that never decrease nor pass the end: these kernels write wherever they are told to."""
    return cu_seqlens.clamp(0, tokens).cummax(0).values.int()


def takes_half(x: Tensor, *_rest: Any) -> bool:
    return x.dtype in (torch.bfloat16, torch.float16) and architecture(x.device) >= 80


def takes_varlen(x: Tensor, *_rest: Any) -> bool:
    return takes_half(x) and torch.version.hip is None  # whose lse has another shape


def varlen(
    qkv: Tensor, cu_seqlens: Tensor, max_seqlen: int, scale: float, equal: bool = False
) -> tuple[Tensor, Tensor]:
    """What torch.nn.attention.varlen runs: its own flash attention."""
    starts = _within(cu_seqlens, len(qkv))
    out, lse, *_ = aten._flash_attention_forward(
        *_rows_dense(qkv).unbind(1), starts, starts, max_seqlen, max_seqlen, 0.0, False, False,
        scale=scale,
    )  # fmt: skip
    return _ended(out, lse, cu_seqlens)


def varlen_backward(
    dout: Tensor, qkv: Tensor, out: Tensor, lse: Tensor, cu_seqlens: Tensor, max_seqlen: int, scale: float
) -> Tensor:
    starts = _within(cu_seqlens, len(qkv))
    random = torch.zeros(2, dtype=torch.uint64, device=qkv.device)  # a state that only dropout reads
    gradients = aten._flash_attention_backward(
        _rows_dense(dout), *_rows_dense(qkv).unbind(1), out, lse, starts, starts,
        max_seqlen, max_seqlen, 0.0, False, random, torch.empty(0, device=qkv.device), scale=scale,
    )  # fmt: skip
    past = _past_the_end(cu_seqlens, len(qkv))
    return torch.stack(gradients, dim=1).masked_fill_(past[:, None, None, None], 0)


def _flash_attn_has(*file: str) -> bool:
    """Whether the package flash_attn holds this file; looking for a module in it would import it."""
    spec = find_spec("flash_attn")
    folders = (spec and spec.submodule_search_locations) or ()
    return any(Path(folder, *file).is_file() for folder in folders)


def fa2_installed() -> bool:
    return find_spec("flash_attn_2_cuda") is not None and _flash_attn_has("flash_attn_interface.py")


def fa2(
    qkv: Tensor, cu_seqlens: Tensor, max_seqlen: int, scale: float, equal: bool = False
) -> tuple[Tensor, Tensor]:
    from flash_attn.flash_attn_interface import _flash_attn_varlen_forward

    starts = _within(cu_seqlens, len(qkv))
    q, k, v = _rows_dense(qkv).unbind(1)
    out, lse, *_ = _flash_attn_varlen_forward(
        q, k, v,
        cu_seqlens_q=starts, cu_seqlens_k=starts, max_seqlen_q=max_seqlen, max_seqlen_k=max_seqlen,
        dropout_p=0.0, softmax_scale=scale, causal=False,
    )  # fmt: skip
    return _ended(out, lse, cu_seqlens)


def fa2_backward(
    dout: Tensor, qkv: Tensor, out: Tensor, lse: Tensor, cu_seqlens: Tensor, max_seqlen: int, scale: float
) -> Tensor:
    from flash_attn.flash_attn_interface import _flash_attn_varlen_backward

    starts = _within(cu_seqlens, len(qkv))
    q, k, v = _rows_dense(qkv).unbind(1)
    dqkv = torch.empty_like(qkv, memory_format=torch.contiguous_format)
    dq, dk, dv = dqkv.unbind(1)
    _flash_attn_varlen_backward(
        _rows_dense(dout), q, k, v, out, lse, dq, dk, dv,
        cu_seqlens_q=starts, cu_seqlens_k=starts, max_seqlen_q=max_seqlen, max_seqlen_k=max_seqlen,
        dropout_p=0.0, softmax_scale=scale, causal=False, window_size_left=-1, window_size_right=-1,
        softcap=0.0, alibi_slopes=None, deterministic=torch.are_deterministic_algorithms_enabled(),
    )  # fmt: skip
    return dqkv.masked_fill_(_past_the_end(cu_seqlens, len(qkv))[:, None, None, None], 0)


def fa4_installed() -> bool:
    return _flash_attn_has("cute", "interface.py")


def takes_fa4(x: Tensor, *_rest: Any) -> bool:
    return takes_half(x) and 90 <= architecture(x.device) < 900  # AMD's begin there


def fa4(
    qkv: Tensor, cu_seqlens: Tensor, max_seqlen: int, scale: float, equal: bool = False
) -> tuple[Tensor, Tensor]:
    from flash_attn.cute.interface import _flash_attn_fwd

    starts = _within(cu_seqlens, len(qkv))
    q, k, v = _rows_dense(qkv).unbind(1)
    out, lse, *_ = _flash_attn_fwd(
        q, k, v,
        cu_seqlens_q=starts, cu_seqlens_k=starts, max_seqlen_q=max_seqlen, max_seqlen_k=max_seqlen,
        softmax_scale=scale, return_lse=True,
    )  # fmt: skip
    return _ended(out, lse, cu_seqlens)


def fa4_backward(
    dout: Tensor, qkv: Tensor, out: Tensor, lse: Tensor, cu_seqlens: Tensor, max_seqlen: int, scale: float
) -> Tensor:
    from flash_attn.cute.interface import _flash_attn_bwd

    starts = _within(cu_seqlens, len(qkv))
    q, k, v = _rows_dense(qkv).unbind(1)
    dq, dk, dv, *_ = _flash_attn_bwd(
        q, k, v, out, _rows_dense(dout), lse,
        cu_seqlens_q=starts, cu_seqlens_k=starts, max_seqlen_q=max_seqlen, max_seqlen_k=max_seqlen,
        softmax_scale=scale, deterministic=torch.are_deterministic_algorithms_enabled(),
    )  # fmt: skip
    past = _past_the_end(cu_seqlens, len(qkv))
    return torch.stack([dq, dk, dv], dim=1).masked_fill_(past[:, None, None, None], 0)
