"""Other people's kernels that run on a GPU only: what they are given, and what is made of what they return.

In their place stand functions with their signatures, which write nothing past the end, as theirs do.
"""

import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import fastjepa_kernels as fk
from fastjepa_kernels import attention_stock as stock
from fastjepa_kernels.language import assumed_architecture

STARTS = torch.tensor([0, 5, 5, 8], dtype=torch.int32)
TOKENS, LONGEST, SCALE = 10, 6, 0.3


def check_starts(of_queries: Tensor | None, of_keys: Tensor | None) -> None:
    assert of_queries is of_keys
    assert of_queries is not None
    assert of_queries.dtype == torch.int32
    assert torch.equal(of_queries, STARTS)


def forward(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    out, lse = torch.ops.fastjepa.packed_attention(
        torch.stack([q, k, v], 1), STARTS, LONGEST, scale, "torch!"
    )
    out[8:], lse[:, 8:] = float("nan"), float("nan")
    return out, lse


def backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float
) -> tuple[Tensor, ...]:
    dqkv = torch.ops.fastjepa.packed_attention_backward(
        dout, torch.stack([q, k, v], 1), out, lse, STARTS, LONGEST, scale, "torch!"
    )
    dqkv[8:] = float("nan")
    return dqkv.unbind(1)


def _flash_attention_forward(
    query: Tensor, key: Tensor, value: Tensor, cum_seq_q: Tensor, cum_seq_k: Tensor, max_q: int, max_k: int,
    dropout_p: float, is_causal: bool, return_debug_mask: bool, *, scale: float,
) -> tuple[Tensor, ...]:  # fmt: skip
    check_starts(cum_seq_q, cum_seq_k)
    assert (max_q, max_k, dropout_p, is_causal, return_debug_mask) == (LONGEST, LONGEST, 0.0, False, False)
    return *forward(query, key, value, scale), torch.zeros(2), torch.zeros(0), torch.zeros(0)


def _flash_attention_backward(
    grad_out: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, logsumexp: Tensor,
    cum_seq_q: Tensor, cum_seq_k: Tensor, max_q: int, max_k: int, dropout_p: float, is_causal: bool,
    rng_state: Tensor, unused: Tensor, *, scale: float,
) -> tuple[Tensor, ...]:  # fmt: skip
    check_starts(cum_seq_q, cum_seq_k)
    assert (max_q, max_k, dropout_p, is_causal) == (LONGEST, LONGEST, 0.0, False)
    return backward(grad_out, query, key, value, out, logsumexp, scale)


def _flash_attn_varlen_forward(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int,
    max_seqlen_k: int, dropout_p: float, softmax_scale: float, causal: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    check_starts(cu_seqlens_q, cu_seqlens_k)
    assert (max_seqlen_q, max_seqlen_k, dropout_p, causal) == (LONGEST, LONGEST, 0.0, False)
    return *forward(q, k, v, softmax_scale), torch.zeros(0), torch.zeros(2)


def _flash_attn_varlen_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, softmax_lse: Tensor, dq: Tensor, dk: Tensor,
    dv: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int, max_seqlen_k: int,
    dropout_p: float, softmax_scale: float, causal: bool, window_size_left: int, window_size_right: int,
    softcap: float, alibi_slopes: Tensor | None, deterministic: bool,
) -> Tensor:  # fmt: skip
    check_starts(cu_seqlens_q, cu_seqlens_k)
    assert (max_seqlen_q, max_seqlen_k, dropout_p, causal, softcap) == (LONGEST, LONGEST, 0.0, False, 0.0)
    assert (window_size_left, window_size_right, alibi_slopes, deterministic) == (-1, -1, None, False)
    found = backward(dout, q, k, v, out, softmax_lse, softmax_scale)
    for to, gradient in zip((dq, dk, dv), found, strict=True):
        to.copy_(gradient)
    return torch.zeros(0)


def _flash_attn_fwd(
    q: Tensor, k: Tensor, v: Tensor, qv: Tensor | None = None, cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None, max_seqlen_q: int | None = None, max_seqlen_k: int | None = None,
    softmax_scale: float | None = None, causal: bool = False, return_lse: bool = False,
) -> tuple[Any, ...]:  # fmt: skip
    check_starts(cu_seqlens_q, cu_seqlens_k)
    assert (max_seqlen_q, max_seqlen_k, return_lse) == (LONGEST, LONGEST, True)
    assert softmax_scale is not None
    return *forward(q, k, v, softmax_scale), None, None


def _flash_attn_bwd(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, dout: Tensor, lse: Tensor,
    softmax_scale: float | None = None, causal: bool = False, softcap: float = 0.0,
    cu_seqlens_q: Tensor | None = None, cu_seqlens_k: Tensor | None = None, max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None, deterministic: bool = False,
) -> tuple[Tensor, ...]:  # fmt: skip
    check_starts(cu_seqlens_q, cu_seqlens_k)
    assert (max_seqlen_q, max_seqlen_k, deterministic) == (LONGEST, LONGEST, False)
    assert softmax_scale is not None
    return backward(dout, q, k, v, out, lse, softmax_scale)


def scores_of(query: Tensor, key: Tensor, bias: Tensor, scale: float) -> Tensor:
    sequences, heads, length, _ = query.shape
    assert length % 32 == 0, "the kernel wants its bias and lse aligned"
    assert bias.shape == (sequences, heads, length, length)
    return query @ key.mT * scale + bias


def _scaled_dot_product_efficient_attention(
    query: Tensor, key: Tensor, value: Tensor, attn_bias: Tensor, compute_log_sumexp: bool,
    dropout_p: float = 0.0, is_causal: bool = False, *, scale: float,
) -> tuple[Tensor, ...]:  # fmt: skip
    assert compute_log_sumexp
    scores = scores_of(query, key, attn_bias, scale)
    return scores.softmax(-1) @ value, scores.logsumexp(-1), torch.zeros(()), torch.zeros(())


def _scaled_dot_product_efficient_attention_backward(
    grad_out_: Tensor, query: Tensor, key: Tensor, value: Tensor, attn_bias: Tensor, out: Tensor,
    logsumexp: Tensor, philox_seed: Tensor, philox_offset: Tensor, dropout_p: float,
    grad_input_mask: list[bool], is_causal: bool = False, *, scale: float,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    assert grad_input_mask == [True, True, True, False]
    p = (scores_of(query, key, attn_bias, scale) - logsumexp[..., None]).exp()
    ds = p * (grad_out_ @ value.mT - (grad_out_ * out).sum(-1, keepdim=True)) * scale
    return ds @ key, ds.mT @ query, p.mT @ grad_out_, None


def module(name: str, **functions: Callable[..., Any]) -> ModuleType:
    made = ModuleType(name)
    made.__dict__.update(functions)
    return made


@pytest.fixture
def stand_ins(monkeypatch: pytest.MonkeyPatch) -> None:
    functions = (
        _flash_attention_forward,
        _flash_attention_backward,
        _scaled_dot_product_efficient_attention,
        _scaled_dot_product_efficient_attention_backward,
    )
    monkeypatch.setattr(stock, "aten", SimpleNamespace(**{each.__name__: each for each in functions}))
    for made in (
        module("flash_attn"),
        module("flash_attn.cute"),
        module(
            "flash_attn.flash_attn_interface",
            _flash_attn_varlen_forward=_flash_attn_varlen_forward,
            _flash_attn_varlen_backward=_flash_attn_varlen_backward,
        ),
        module("flash_attn.cute.interface", _flash_attn_fwd=_flash_attn_fwd, _flash_attn_bwd=_flash_attn_bwd),
    ):
        monkeypatch.setitem(sys.modules, made.__name__, made)


@pytest.mark.usefixtures("stand_ins")
@pytest.mark.parametrize(
    ("run", "run_backward"),
    [
        (stock.varlen, stock.varlen_backward),
        (stock.fa2, stock.fa2_backward),
        (stock.fa4, stock.fa4_backward),
        (stock._sdpa_padded, stock._sdpa_padded_backward),
    ],
)
def test_they_are_given_and_return_what_the_reference_does(
    run: Callable[..., tuple[Tensor, Tensor]], run_backward: Callable[..., Tensor]
) -> None:
    qkv, dout = torch.randn(TOKENS, 2, 3, 8).transpose(1, 2), torch.randn(TOKENS, 2, 8)
    qkv[8:], dout[8:] = float("nan"), float("nan")
    ops, arguments = torch.ops.fastjepa, (STARTS, LONGEST, SCALE)
    out, lse = ops.packed_attention(qkv, *arguments, "torch!")
    torch.testing.assert_close(run(qkv, *arguments), (out, lse))
    dqkv = ops.packed_attention_backward(dout, qkv, out, lse, *arguments, "torch!")
    torch.testing.assert_close(run_backward(dout, qkv, out, lse, *arguments), dqkv)


@pytest.mark.parametrize(
    "stand_in",
    [
        _flash_attention_forward,
        _flash_attention_backward,
        _scaled_dot_product_efficient_attention,
        _scaled_dot_product_efficient_attention_backward,
    ],
)
def test_torch_has_kernels_with_these_arguments(stand_in: Callable[..., Any]) -> None:
    schema = getattr(torch.ops.aten, stand_in.__name__).default._schema
    names = [argument.name for argument in schema.arguments]
    assumed = [*stand_in.__annotations__][:-1]
    positional = [name for name in assumed if name != "scale"]
    assert names[: len(positional)] == positional
    assert "scale" in names


@pytest.mark.parametrize(
    ("files", "installed"),
    [
        ([], (False, False)),
        (["flash_attn/__init__.py"], (False, False)),
        (["flash_attn/flash_attn_interface.py", "flash_attn_2_cuda.py"], (True, False)),
        (["flash_attn/flash_attn_interface.py"], (False, False)),
        (["flash_attn/cute/interface.py"], (False, True)),
    ],
)
def test_what_is_installed_is_seen_without_importing_it(
    files: list[str], installed: tuple[bool, bool], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for file in files:
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_text("raise AssertionError('imported')")
    monkeypatch.setattr(
        sys, "path", [str(tmp_path), *(path for path in sys.path if "site-packages" not in path)]
    )
    assert (stock.fa2_installed(), stock.fa4_installed()) == installed


def test_what_they_take() -> None:
    half, single, double = (torch.empty(4, 3, 1, 8, dtype=d) for d in (torch.half, torch.float, torch.double))
    assert stock.takes_sdpa(double, STARTS)
    for architecture, of_fa2, of_fa4 in (
        (75, False, False),
        (80, True, False),
        (90, True, True),
        (942, True, False),
    ):
        with assumed_architecture(architecture):
            assert stock.takes_half(half, STARTS) == stock.takes_half(half.bfloat16(), STARTS) == of_fa2
            assert stock.takes_fa4(half, STARTS) == of_fa4
            assert not stock.takes_half(single, STARTS)
            assert not stock.takes_fa4(single, STARTS)


def test_none_of_them_is_offered_on_the_cpu() -> None:
    assert set(fk.implementations("packed_attention", "cpu")) <= {"cpp", "sdpa", "torch", "triton"}
    with (
        pytest.raises(ValueError, match="packed_attention cannot run as 'varlen'"),
        fk.use("varlen", strict=True),
    ):
        fk.packed_attention(torch.zeros(2, 3, 1, 8), torch.tensor([0, 2], dtype=torch.int32), 2)
