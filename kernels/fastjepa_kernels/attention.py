"""packed_attention: self-attention over many short sequences laid end to end.

For each sequence and head: softmax(scale * q k^T) v, with q, k, v read from one packed tensor.

Bytes that must move: qkv in and o out, 4 * T * H * d elements. With sequences of 60 to 225 tokens
the arithmetic intensity is about L / 2 FLOP per byte, so bytes decide, not FLOPs.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from fastjepa_kernels.checks import (
    require,
    require_cu_seqlens,
    require_float,
    require_same_device,
    shape_of,
)
from fastjepa_kernels.sequences import rows_in_sequences, sequence_of_rows

MAX_HEAD_DIM = 128


def _reference(qkv: Tensor, cu_seqlens: Tensor, max_seqlen: int, scale: float) -> Tensor:
    """Pads every sequence to the bound, attends under a mask of keys, and takes the rows back."""
    tokens, _, heads, head_dim = qkv.shape
    sequences = cu_seqlens.numel() - 1
    sequence = sequence_of_rows(cu_seqlens, tokens)  # [T]
    place = torch.arange(tokens, device=qkv.device) - cu_seqlens[sequence]  # [T]
    # Rows past the last sequence go to one spare row, whose output is replaced by zero.
    valid = rows_in_sequences(cu_seqlens, tokens)  # [T]
    slot = torch.where(valid, sequence * max_seqlen + place, sequences * max_seqlen)  # [T]

    padded = qkv.new_zeros(sequences * max_seqlen + 1, 3, heads, head_dim)
    padded = padded.index_copy(0, slot, qkv)
    query, key, value = (
        padded[:-1].view(sequences, max_seqlen, 3, heads, head_dim).permute(2, 0, 3, 1, 4)
    )  # [S, H, L, d] each
    allowed = torch.arange(max_seqlen, device=qkv.device) < cu_seqlens.diff()[:, None]  # [S, L]
    allowed = allowed | (cu_seqlens.diff() == 0)[:, None]  # an empty sequence must not make NaN
    out = F.scaled_dot_product_attention(
        query, key, value, attn_mask=allowed[:, None, None, :], scale=scale
    )  # [S, H, L, d]
    rows = out.transpose(1, 2).reshape(sequences * max_seqlen, heads, head_dim)
    taken = rows.index_select(0, torch.where(valid, slot, 0))
    return torch.where(valid[:, None, None], taken, 0)


def packed_attention(qkv: Tensor, cu_seqlens: Tensor, max_seqlen: int, scale: float | None = None) -> Tensor:
    """Attend within each sequence of a packed stream.

    Args:
        qkv: [T, 3, H, d] floating point, any strides; d a multiple of 8 up to 128.
        cu_seqlens: int32 [S + 1] on the device of `qkv`; sequences may be empty.
        max_seqlen: an upper bound of the lengths, known on the host.
        scale: of the scores; 1 / sqrt(d) by default.

    Returns:
        [T, H, d]. Rows past cu_seqlens[-1] are zero, and so are their gradients.

    Raises:
        ValueError: on a wrong shape, dtype, device or head dim; on the CPU also for cu_seqlens that do
            not start at 0, decrease or pass T, and for a sequence longer than max_seqlen.
    """
    require(qkv.ndim == 4 and qkv.shape[1] == 3, f"qkv must be [T, 3, H, d], got {shape_of(qkv)}")
    require_float("qkv", qkv)
    require_same_device(qkv=qkv, cu_seqlens=cu_seqlens)
    tokens, _, heads, head_dim = qkv.shape
    require(
        head_dim % 8 == 0 and 0 < head_dim <= MAX_HEAD_DIM,
        f"head dim must be a multiple of 8 up to {MAX_HEAD_DIM}, got {head_dim}",
    )
    require(max_seqlen >= 0, f"max_seqlen must be 0 or more, got {max_seqlen}")
    require_cu_seqlens(cu_seqlens, tokens, max_seqlen)
    if tokens == 0 or cu_seqlens.numel() == 1 or max_seqlen == 0:
        everything = torch.ones((), dtype=torch.bool, device=qkv.device)
        return qkv[:, 0].masked_fill(everything, 0)  # zero whatever is in there, and part of the graph
    return _reference(qkv, cu_seqlens, max_seqlen, head_dim**-0.5 if scale is None else scale)
