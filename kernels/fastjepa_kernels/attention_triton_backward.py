"""packed_attention in Triton: the backward kernels and their host function.

Every number of the gradient has one program that writes it, once: no atomics, and the same bits each time.
"""

import math

import torch
from torch import Tensor

from fastjepa_kernels.attention_triton import (
    CHANGING,
    backward_tile,
    backward_tiles,
    bounds_of,
    counts_in_int32,
    fill_zeros,
    in_eights,
    load_rows,
    padded_head_dim,
    store_rows,
)
from fastjepa_kernels.language import architecture, tl, triton

_SMALLEST_SCALE = 1e-30  # is divided by, and makes every probability the same as 0 does


@triton.jit(do_not_specialize=CHANGING)
def backward_whole(
    dout,  # [T, H, d]
    qkv,  # [T, 3, H, d]
    out,  # [T, H, d], dense
    lse,  # fp32 [H, T]
    cu_seqlens,  # int32 [S + 1]
    dqkv,  # [T, 3, H, d], dense
    tokens,
    heads,
    sequences,
    dout_row,
    dout_head,
    qkv_row,
    qkv_part,
    qkv_head,
    scale,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """A program has one head of one sequence of at most BLOCK_N tokens, and every gradient of it."""
    LOG2E: tl.constexpr = 1.4426950408889634
    head = tl.program_id(0) % heads
    sequence = tl.program_id(0) // heads
    start, length = bounds_of(cu_seqlens, sequence, sequences, tokens)
    start64 = start.to(tl.int64)
    out_row = heads * HEAD_DIM
    dqkv_row = 3 * out_row
    dq_head = dqkv + start64 * dqkv_row + head * HEAD_DIM
    if sequence == sequences:
        for i in tl.static_range(3):
            fill_zeros(dq_head + i * out_row, length, 0, 1, dqkv_row, BLOCK_M, HEAD_DIM, BLOCK_D)
        return
    row = qkv_row * 8
    do_row = dout_row * 8
    q_head = qkv + start64 * row + head * (qkv_head * 8)
    out += start64 * out_row + head * HEAD_DIM
    dout += start64 * do_row + head * (dout_head * 8)
    lse += head.to(tl.int64) * tokens + start
    k = load_rows(q_head + qkv_part * 8, length, row, BLOCK_N, HEAD_DIM, BLOCK_D)  # [N, d]
    v = load_rows(q_head + 2 * (qkv_part * 8), length, row, BLOCK_N, HEAD_DIM, BLOCK_D)  # [N, d]
    dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    scale_log2 = scale * LOG2E
    for first in range(0, length, BLOCK_M):
        left = length - first
        q = load_rows(q_head + first * row, left, row, BLOCK_M, HEAD_DIM, BLOCK_D)  # [M, d]
        do = load_rows(dout + first * do_row, left, do_row, BLOCK_M, HEAD_DIM, BLOCK_D)  # [M, d]
        o = load_rows(out + first * out_row, left, out_row, BLOCK_M, HEAD_DIM, BLOCK_D)  # [M, d]
        rows = first + tl.arange(0, BLOCK_M)
        log2 = tl.load(lse + rows, mask=rows < length, other=0.0) * LOG2E  # [M]
        # Keys along the rows: probabilities are then the left side of the products for dk and dv as they are.
        # Products are added to what is to be subtracted from them, which so takes no registers of its own.
        delta = tl.sum(o.to(tl.float32) * do.to(tl.float32), axis=1)  # [M]
        dp = tl.zeros([BLOCK_N, BLOCK_M], tl.float32) - delta[None, :]
        dp = tl.dot(v, tl.trans(do), dp, input_precision="ieee")  # [N, M]
        scores = tl.zeros([BLOCK_N, BLOCK_M], tl.float32) - (log2 / scale_log2)[None, :]
        scores = tl.dot(k, tl.trans(q), scores, input_precision="ieee") * scale_log2  # [N, M]
        # Compared anew in every round, as in forward_whole, to hold no answers in registers.
        is_key = first + tl.arange(0, BLOCK_N)[:, None] < first + length
        p = tl.where(is_key, tl.exp2(scores), 0.0)
        dv = tl.dot(p.to(do.dtype), do, dv, input_precision="ieee")
        ds = (p * dp).to(q.dtype)
        dk = tl.dot(ds, q, dk, input_precision="ieee")
        dq = tl.dot(tl.trans(ds), k, input_precision="ieee") * scale  # [M, d]
        store_rows(dq_head + first * dqkv_row, dq, left, dqkv_row, BLOCK_M, HEAD_DIM, BLOCK_D)
    store_rows(dq_head + out_row, dk * scale, length, dqkv_row, BLOCK_N, HEAD_DIM, BLOCK_D)
    store_rows(dq_head + 2 * out_row, dv, length, dqkv_row, BLOCK_N, HEAD_DIM, BLOCK_D)


@triton.jit(do_not_specialize=CHANGING)
def backward_queries(
    dout,  # [T, H, d]
    qkv,  # [T, 3, H, d]
    out,  # [T, H, d], dense
    lse,  # fp32 [H, T]
    cu_seqlens,  # int32 [S + 1]
    dqkv,  # [T, 3, H, d], dense
    delta,  # fp32 [H, T], written here for backward_keys
    tokens,
    heads,
    sequences,
    blocks,
    dout_row,
    dout_head,
    qkv_row,
    qkv_part,
    qkv_head,
    scale,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """The gradient of BLOCK_M queries, and sum(dout * out) of each."""
    LOG2E: tl.constexpr = 1.4426950408889634
    head = tl.program_id(0) % heads
    block = tl.program_id(0) // heads % blocks
    sequence = tl.program_id(0) // heads // blocks
    start, length = bounds_of(cu_seqlens, sequence, sequences, tokens)
    start64 = start.to(tl.int64)
    out_row = heads * HEAD_DIM
    dqkv_row = 3 * out_row
    dq_head = dqkv + start64 * dqkv_row + head * HEAD_DIM
    if sequence == sequences:
        fill_zeros(dq_head, length, block, blocks, dqkv_row, BLOCK_M, HEAD_DIM, BLOCK_D)
        return
    first = block * BLOCK_M
    left = length - first
    if left <= 0:
        return
    first64 = first.to(tl.int64)
    row = qkv_row * 8
    do_row = dout_row * 8
    q_head = qkv + start64 * row + head * (qkv_head * 8)
    k_head = q_head + qkv_part * 8
    v_head = k_head + qkv_part * 8
    out += (start64 + first64) * out_row + head * HEAD_DIM
    dout += (start64 + first64) * do_row + head * (dout_head * 8)
    of_head = head.to(tl.int64) * tokens + start
    rows = first + tl.arange(0, BLOCK_M)
    log2 = tl.load(lse + of_head + rows, mask=rows < length, other=0.0) * LOG2E  # [M]
    do = load_rows(dout, left, do_row, BLOCK_M, HEAD_DIM, BLOCK_D)  # [M, d]
    o = load_rows(out, left, out_row, BLOCK_M, HEAD_DIM, BLOCK_D)  # [M, d]
    products = tl.sum(o.to(tl.float32) * do.to(tl.float32), axis=1)  # [M]
    tl.store(delta + of_head + rows, products, mask=rows < length)
    q = load_rows(q_head + first64 * row, left, row, BLOCK_M, HEAD_DIM, BLOCK_D)  # [M, d]
    dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for key in range(0, length, BLOCK_N):
        there = tl.cast(key, tl.int64) * row
        k = load_rows(k_head + there, length - key, row, BLOCK_N, HEAD_DIM, BLOCK_D)  # [N, d]
        v = load_rows(v_head + there, length - key, row, BLOCK_N, HEAD_DIM, BLOCK_D)  # [N, d]
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * (scale * LOG2E)  # [M, N]
        is_key = key + tl.arange(0, BLOCK_N)[None, :] < length
        p = tl.where(is_key, tl.exp2(scores - log2[:, None]), 0.0)
        dp = tl.dot(do, tl.trans(v), input_precision="ieee")  # [M, N]
        ds = (p * (dp - products[:, None])).to(k.dtype)
        dq = tl.dot(ds, k, dq, input_precision="ieee")
    store_rows(dq_head + first64 * dqkv_row, dq * scale, left, dqkv_row, BLOCK_M, HEAD_DIM, BLOCK_D)


@triton.jit(do_not_specialize=CHANGING)
def backward_keys(
    dout,  # [T, H, d]
    qkv,  # [T, 3, H, d]
    lse,  # fp32 [H, T]
    delta,  # fp32 [H, T], from backward_queries
    cu_seqlens,  # int32 [S + 1]
    dqkv,  # [T, 3, H, d], dense
    tokens,
    heads,
    sequences,
    blocks,
    dout_row,
    dout_head,
    qkv_row,
    qkv_part,
    qkv_head,
    scale,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """The gradients of BLOCK_N keys and values."""
    LOG2E: tl.constexpr = 1.4426950408889634
    head = tl.program_id(0) % heads
    block = tl.program_id(0) // heads % blocks
    sequence = tl.program_id(0) // heads // blocks
    start, length = bounds_of(cu_seqlens, sequence, sequences, tokens)
    start64 = start.to(tl.int64)
    out_row = heads * HEAD_DIM
    dqkv_row = 3 * out_row
    dk_head = dqkv + start64 * dqkv_row + out_row + head * HEAD_DIM
    dv_head = dk_head + out_row
    if sequence == sequences:
        fill_zeros(dk_head, length, block, blocks, dqkv_row, BLOCK_N, HEAD_DIM, BLOCK_D)
        fill_zeros(dv_head, length, block, blocks, dqkv_row, BLOCK_N, HEAD_DIM, BLOCK_D)
        return
    key = block * BLOCK_N
    left = length - key
    if left <= 0:
        return
    key64 = key.to(tl.int64)
    row = qkv_row * 8
    do_row = dout_row * 8
    q_head = qkv + start64 * row + head * (qkv_head * 8)
    k_head = q_head + qkv_part * 8 + key64 * row
    dout += start64 * do_row + head * (dout_head * 8)
    of_head = head.to(tl.int64) * tokens + start
    k = load_rows(k_head, left, row, BLOCK_N, HEAD_DIM, BLOCK_D)  # [N, d]
    v = load_rows(k_head + qkv_part * 8, left, row, BLOCK_N, HEAD_DIM, BLOCK_D)  # [N, d]
    dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    for first in range(0, length, BLOCK_M):
        first64 = tl.cast(first, tl.int64)
        q = load_rows(q_head + first64 * row, length - first, row, BLOCK_M, HEAD_DIM, BLOCK_D)  # [M, d]
        do = load_rows(dout + first64 * do_row, length - first, do_row, BLOCK_M, HEAD_DIM, BLOCK_D)  # [M, d]
        rows = first + tl.arange(0, BLOCK_M)
        log2 = tl.load(lse + of_head + rows, mask=rows < length, other=0.0) * LOG2E  # [M]
        products = tl.load(delta + of_head + rows, mask=rows < length, other=0.0)  # [M]
        scores = tl.dot(k, tl.trans(q), input_precision="ieee") * (scale * LOG2E)  # [N, M]
        # Keys past the end get gradients too, which nobody writes; queries past it are zero and add nothing.
        p = tl.exp2(scores - log2[None, :])
        dv = tl.dot(p.to(do.dtype), do, dv, input_precision="ieee")
        dp = tl.dot(v, tl.trans(do), input_precision="ieee")  # [N, M]
        ds = (p * (dp - products[None, :])).to(q.dtype)
        dk = tl.dot(ds, q, dk, input_precision="ieee")
    store_rows(dk_head + key64 * dqkv_row, dk * scale, left, dqkv_row, BLOCK_N, HEAD_DIM, BLOCK_D)
    store_rows(dv_head + key64 * dqkv_row, dv, left, dqkv_row, BLOCK_N, HEAD_DIM, BLOCK_D)


def attention_backward(
    dout: Tensor,
    qkv: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    scale: float,
) -> Tensor:
    """dqkv [T, 3, H, d]."""
    tokens, _, heads, head_dim = qkv.shape
    sequences = cu_seqlens.numel() - 1
    cu_seqlens = cu_seqlens.contiguous()
    dqkv = qkv.new_empty(tokens, 3, heads, head_dim)
    qkv, dout, out, lse = in_eights(qkv), in_eights(dout), out.contiguous(), lse.contiguous()
    strides = [stride // 8 for stride in (*dout.stride()[:2], *qkv.stride()[:3])]
    size = (architecture(qkv.device), qkv.element_size())
    head = {"HEAD_DIM": head_dim, "BLOCK_D": padded_head_dim(head_dim)}
    scale = math.copysign(max(abs(scale), _SMALLEST_SCALE), scale)
    tile = backward_tile(head_dim, max_seqlen, *size)
    if tile is not None and counts_in_int32(tokens, qkv.stride(0), dout.stride(0), dqkv.stride(0)):
        backward_whole[(heads * (sequences + 1),)](
            dout, qkv, out, lse, cu_seqlens, dqkv, tokens, heads, sequences, *strides, scale,
            **head, BLOCK_M=tile.queries, BLOCK_N=tile.keys, **tile.launch,
        )  # fmt: skip
        return dqkv
    for_queries, for_keys = backward_tiles(head_dim, *size)
    delta = torch.empty_like(lse)
    blocks = triton.cdiv(max_seqlen, for_queries.queries)
    backward_queries[(heads * (sequences + 1) * blocks,)](
        dout, qkv, out, lse, cu_seqlens, dqkv, delta, tokens, heads, sequences, blocks, *strides, scale,
        **head, BLOCK_M=for_queries.queries, BLOCK_N=for_queries.keys, **for_queries.launch,
    )  # fmt: skip
    blocks = triton.cdiv(max_seqlen, for_keys.keys)
    backward_keys[(heads * (sequences + 1) * blocks,)](
        dout, qkv, lse, delta, cu_seqlens, dqkv, tokens, heads, sequences, blocks, *strides, scale,
        **head, BLOCK_M=for_keys.queries, BLOCK_N=for_keys.keys, **for_keys.launch,
    )  # fmt: skip
    return dqkv
