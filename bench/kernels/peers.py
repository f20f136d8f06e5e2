"""Other people's attention, called as their users call it, where it is installed. On a GPU only."""

import functools
from collections.abc import Callable
from importlib.util import find_spec
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from bench.kernels.case import Way
from bench.kernels.stock import padded, unpadded


def attention(device_type: str, lengths: tuple[int, ...]) -> list[Way]:
    """Ways of [T, 3, H, d] and cu_seqlens to [T, H, d]."""
    if device_type != "cuda":
        return []
    longest = max(lengths)
    ways = [
        Way(f"SDPA {name}", "stock", functools.partial(_backend, backend, lengths))
        for name, backend in (
            ("flash", SDPBackend.FLASH_ATTENTION),
            ("efficient", SDPBackend.EFFICIENT_ATTENTION),
            ("cuDNN", SDPBackend.CUDNN_ATTENTION),
        )
    ]
    if find_spec("torch.nn.attention.varlen"):
        ways.append(Way("varlen_attn", "stock", functools.partial(_varlen, longest)))
    ways.append(Way("flex_attention", "stock", functools.partial(_flex, lengths), starts_slowly=True))
    if find_spec("flash_attn_2_cuda"):
        ways.append(Way("flash-attn 2", "peer", functools.partial(_flash_attn_2, longest)))
    if find_spec("flash_attn") and find_spec("flash_attn.cute"):
        ways.append(
            Way("flash-attn 4", "peer", functools.partial(_flash_attn_4, longest), starts_slowly=True)
        )
    return ways


def _backend(backend: SDPBackend, lengths: tuple[int, ...], qkv: Tensor, _cu_seqlens: Tensor) -> Tensor:
    batch, allowed = padded(qkv, lengths)
    query, key, value = batch.permute(2, 0, 3, 1, 4)  # [S, H, L, d] each, views
    with sdpa_kernel(backend):
        out = F.scaled_dot_product_attention(query, key, value, attn_mask=allowed)
    return unpadded(out.transpose(1, 2), lengths)


def _varlen(longest: int, qkv: Tensor, cu_seqlens: Tensor) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    query, key, value = qkv.unbind(1)
    out = varlen_attn(query, key, value, cu_seqlens, cu_seqlens, longest, longest)
    assert isinstance(out, Tensor), "nothing but the output was asked for"
    return out


@functools.cache
def _compiled_flex() -> Callable[..., Any]:
    from torch.nn.attention.flex_attention import flex_attention

    # Every length is compiled for itself; past the limit of 8 it would run uncompiled, and slowly.
    torch._dynamo.config.recompile_limit = 256
    return torch.compile(flex_attention, dynamic=False)


@functools.cache
def _document_mask(lengths: tuple[int, ...], device: torch.device) -> Any:
    """The packed stream as one sequence, in which each token sees those of its own."""
    from torch.nn.attention.flex_attention import create_block_mask

    ends = torch.tensor(list(accumulate(lengths)), device=device)
    document = torch.searchsorted(ends, torch.arange(sum(lengths), device=device), right=True)

    def same(_batch: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return document[query] == document[key]

    tokens = sum(lengths)
    return create_block_mask(same, None, None, tokens, tokens, device=str(device), _compile=True)


def _flex(lengths: tuple[int, ...], qkv: Tensor, _cu_seqlens: Tensor) -> Tensor:
    if len(set(lengths)) == 1:
        batch, _ = padded(qkv, lengths)
        query, key, value = batch.permute(2, 0, 3, 1, 4)  # [S, H, L, d] each, views
        return unpadded(_compiled_flex()(query, key, value).transpose(1, 2), lengths)
    query, key, value = qkv.permute(1, 2, 0, 3)[:, None]  # [1, H, T, d] each, views
    out = _compiled_flex()(query, key, value, block_mask=_document_mask(lengths, qkv.device))
    return out[0].transpose(0, 1)


def _flash_attn_2(longest: int, qkv: Tensor, cu_seqlens: Tensor) -> Tensor:
    from flash_attn import flash_attn_varlen_qkvpacked_func

    return flash_attn_varlen_qkvpacked_func(qkv, cu_seqlens, longest)


def _flash_attn_4(longest: int, qkv: Tensor, cu_seqlens: Tensor) -> Tensor:
    from flash_attn.cute import flash_attn_varlen_func

    query, key, value = qkv.unbind(1)
    out = flash_attn_varlen_func(
        query,
        key,
        value,
        cu_seqlens_q=cu_seqlens,
        cu_seqlens_k=cu_seqlens,
        max_seqlen_q=longest,
        max_seqlen_k=longest,
    )
    return out[0] if isinstance(out, tuple) else out
