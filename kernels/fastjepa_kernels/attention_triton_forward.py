"""packed_attention in Triton: the forward kernels and their host function."""

import torch
from torch import Tensor

from fastjepa_kernels.attention_triton import (
    CHANGING,
    LONG,
    bounds_of,
    counts_in_int32,
    fill_zeros,
    forward_tile,
    in_eights,
    load_rows,
    padded_head_dim,
    store_rows,
)
from fastjepa_kernels.language import architecture, tl, triton


@triton.jit(do_not_specialize=CHANGING)
def forward_whole(
    qkv,  # [T, 3, H, d]
    cu_seqlens,  # int32 [S + 1]
    out,  # [T, H, d], dense
    lse,  # fp32 [H, T]
    tokens,
    heads,
    sequences,
    qkv_row,
    qkv_part,
    qkv_head,
    scale,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """A program has one head of one sequence of at most BLOCK_N tokens, and reads keys and values once."""
    LOG2E: tl.constexpr = 1.4426950408889634
    head = tl.program_id(0) % heads
    sequence = tl.program_id(0) // heads
    start, length = bounds_of(cu_seqlens, sequence, sequences, tokens)
    start64 = start.to(tl.int64)
    out_row = heads * HEAD_DIM
    out += start64 * out_row + head * HEAD_DIM
    lse += head.to(tl.int64) * tokens + start
    if sequence == sequences:
        fill_zeros(out, length, 0, 1, out_row, BLOCK_M, HEAD_DIM, BLOCK_D)
        fill_zeros(lse, length, 0, 1, 1, BLOCK_M, 1, 1)
        return
    row = qkv_row * 8
    q_head = qkv + start64 * row + head * (qkv_head * 8)
    part = qkv_part * 8
    k = load_rows(q_head + part, length, row, BLOCK_N, HEAD_DIM, BLOCK_D)  # [N, d]
    v = load_rows(q_head + 2 * part, length, row, BLOCK_N, HEAD_DIM, BLOCK_D)  # [N, d]
    for first in range(0, length, BLOCK_M):
        q = load_rows(q_head + first * row, length - first, row, BLOCK_M, HEAD_DIM, BLOCK_D)  # [M, d]
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * (scale * LOG2E)  # [M, N]
        # Compared anew in every round: kept over the rounds, the answers would fill a register for each key.
        is_key = first + tl.arange(0, BLOCK_N)[None, :] < first + length
        scores = tl.where(is_key, scores, float("-inf"))
        top = tl.max(scores, axis=1)  # [M]
        p = tl.exp2(scores - top[:, None])
        total = tl.sum(p, axis=1)
        o = tl.dot(p.to(v.dtype), v, input_precision="ieee") / total[:, None]
        store_rows(out + first * out_row, o, length - first, out_row, BLOCK_M, HEAD_DIM, BLOCK_D)
        rows = first + tl.arange(0, BLOCK_M)
        tl.store(lse + rows, (top + tl.log2(total)) / LOG2E, mask=rows < length)


@triton.jit(do_not_specialize=CHANGING)
def forward_blocks(
    qkv,  # [T, 3, H, d]
    cu_seqlens,  # int32 [S + 1]
    out,  # [T, H, d], dense
    lse,  # fp32 [H, T]
    tokens,
    heads,
    sequences,
    blocks,
    qkv_row,
    qkv_part,
    qkv_head,
    scale,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """A program has BLOCK_M queries, and goes through the keys block by block with a running softmax."""
    LOG2E: tl.constexpr = 1.4426950408889634
    head = tl.program_id(0) % heads
    block = tl.program_id(0) // heads % blocks
    sequence = tl.program_id(0) // heads // blocks
    start, length = bounds_of(cu_seqlens, sequence, sequences, tokens)
    start64 = start.to(tl.int64)
    out_row = heads * HEAD_DIM
    out += start64 * out_row + head * HEAD_DIM
    lse += head.to(tl.int64) * tokens + start
    first = block * BLOCK_M
    if sequence == sequences:
        fill_zeros(out, length, block, blocks, out_row, BLOCK_M, HEAD_DIM, BLOCK_D)
        fill_zeros(lse, length, block, blocks, 1, BLOCK_M, 1, 1)
        return
    if first >= length:
        return
    row = qkv_row * 8
    q_head = qkv + start64 * row + head * (qkv_head * 8)
    k_head = q_head + qkv_part * 8
    v_head = k_head + qkv_part * 8
    left = length - first
    q = load_rows(q_head + tl.cast(first, tl.int64) * row, left, row, BLOCK_M, HEAD_DIM, BLOCK_D)  # [M, d]
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    o = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for key in range(0, length, BLOCK_N):
        there = tl.cast(key, tl.int64) * row
        k = load_rows(k_head + there, length - key, row, BLOCK_N, HEAD_DIM, BLOCK_D)  # [N, d]
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * (scale * LOG2E)  # [M, N]
        is_key = key + tl.arange(0, BLOCK_N)[None, :] < length
        scores = tl.where(is_key, scores, float("-inf"))
        higher = tl.maximum(top, tl.max(scores, axis=1))
        p = tl.exp2(scores - higher[:, None])
        shrink = tl.exp2(top - higher)
        top = higher
        total = total * shrink + tl.sum(p, axis=1)
        v = load_rows(v_head + there, length - key, row, BLOCK_N, HEAD_DIM, BLOCK_D)  # [N, d]
        o = tl.dot(p.to(v.dtype), v, o * shrink[:, None], input_precision="ieee")
    out += tl.cast(first, tl.int64) * out_row
    store_rows(out, o / total[:, None], left, out_row, BLOCK_M, HEAD_DIM, BLOCK_D)
    rows = first + tl.arange(0, BLOCK_M)
    tl.store(lse + rows, (top + tl.log2(total)) / LOG2E, mask=rows < length)


def attention(
    qkv: Tensor, cu_seqlens: Tensor, max_seqlen: int, scale: float, equal: bool = False
) -> tuple[Tensor, Tensor]:
    """out [T, H, d] and lse fp32 [H, T]."""
    tokens, _, heads, head_dim = qkv.shape
    sequences = cu_seqlens.numel() - 1
    out = qkv.new_empty(tokens, heads, head_dim)
    lse = qkv.new_empty(heads, tokens, dtype=torch.float32)
    qkv, cu_seqlens = in_eights(qkv), cu_seqlens.contiguous()
    strides = [stride // 8 for stride in qkv.stride()[:3]]
    bound = max_seqlen if counts_in_int32(tokens, qkv.stride(0), out.stride(0)) else LONG
    tile, whole = forward_tile(head_dim, bound, architecture(qkv.device), qkv.element_size())
    constants = {
        "HEAD_DIM": head_dim,
        "BLOCK_D": padded_head_dim(head_dim),
        "BLOCK_M": tile.queries,
        "BLOCK_N": tile.keys,
    }
    if whole:
        forward_whole[(heads * (sequences + 1),)](
            qkv, cu_seqlens, out, lse, tokens, heads, sequences, *strides, scale, **constants, **tile.launch
        )  # fmt: skip
    else:
        blocks = triton.cdiv(max_seqlen, tile.queries)
        forward_blocks[(heads * (sequences + 1) * blocks,)](
            qkv, cu_seqlens, out, lse, tokens, heads, sequences, blocks, *strides, scale,
            **constants, **tile.launch
        )  # fmt: skip
    return out, lse
