from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import pytest
import timm
import torch
from timm.layers import set_fused_attn
from timm.layers.attention import Attention
from torch import nn

import fastjepa_kernels as fk

PackedCalls = Callable[[], AbstractContextManager[list[tuple[int, ...]]]]


def small_vit() -> nn.Module:
    return timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, depth=2, num_classes=0)


@pytest.mark.parametrize(
    "options", [{"gated": True, "scale_norm": True}, {"dim_out": 8, "attn_head_dim": 16, "proj_bias": False}]
)
def test_attention_with_options_agrees(packed_calls: PackedCalls, options: dict[str, Any]) -> None:
    attention = Attention(24, 3, norm_layer=nn.LayerNorm, device="cpu", dtype=torch.float64, **options)
    x = torch.randn(2, 7, 24, dtype=torch.float64)
    expected = attention(x)
    fk.integrations.patch_timm(attention)
    with packed_calls() as calls:
        torch.testing.assert_close(attention(x), expected)
    assert len(calls) == 1


def test_calls_with_a_mask_take_the_original_path(packed_calls: PackedCalls) -> None:
    attention = Attention(16, 2).eval()
    x, allowed = torch.randn(2, 5, 16), torch.rand(2, 1, 5, 5) < 0.7
    arguments: list[dict[str, Any]] = [{"attn_mask": allowed | torch.eye(5).bool()}, {"is_causal": True}]
    expected = [attention(x, **given) for given in arguments]
    fk.integrations.patch_timm(attention)
    with packed_calls() as calls:
        for given, out in zip(arguments, expected, strict=True):
            assert torch.equal(attention(x, **given), out)
        attention.fused_attn = False
        torch.testing.assert_close(attention(x), attention(x, attn_mask=torch.ones(5, 5).bool()))
    assert not calls


def test_unfused_attention_is_kept() -> None:
    set_fused_attn(False)
    try:
        model = small_vit()
    finally:
        set_fused_attn(True)
    with pytest.warns(UserWarning, match="fused_attn is off"):
        fk.integrations.patch_timm(model)


def test_a_symbolic_trace_draws_the_original_graph() -> None:
    model = nn.Sequential(Attention(16, 2)).eval()
    x = torch.randn(2, 5, 16)
    expected = torch.fx.symbolic_trace(model)(x)
    fk.integrations.patch_timm(model)
    assert torch.equal(torch.fx.symbolic_trace(model)(x), expected)
