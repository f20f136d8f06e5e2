from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AttentionInterface, IJepaConfig, IJepaModel, ViTConfig, ViTModel

import fastjepa_kernels as fk

PackedCalls = Callable[[], AbstractContextManager[list[tuple[int, ...]]]]

SMALL: dict[str, Any] = {
    "hidden_size": 32,
    "num_attention_heads": 2,
    "num_hidden_layers": 2,
    "intermediate_size": 48,
    "image_size": 32,
    "patch_size": 8,
}


def ijepa(**options: Any) -> Any:
    return IJepaModel(IJepaConfig(**(SMALL | options))).eval()


def test_calls_with_a_mask_take_the_original_path(packed_calls: PackedCalls) -> None:
    model = ijepa()
    images, mask = torch.randn(3, 3, 32, 32), torch.ones(3, 16, dtype=torch.bool)
    mask[:, 11:] = False
    expected = model(images, attention_mask=mask).last_hidden_state
    attention = model.get_submodule("layers.0.attention")
    hidden = torch.randn(3, 16, 32)
    causal = attention(hidden, is_causal=True)[0]
    fk.integrations.patch_transformers(model)
    with packed_calls() as calls:
        assert torch.equal(model(images, attention_mask=mask).last_hidden_state, expected)
        assert torch.equal(attention(hidden, is_causal=True)[0], causal)
    assert not calls


def test_calls_for_weights_take_the_original_path(packed_calls: PackedCalls) -> None:
    model = ViTModel(ViTConfig(**SMALL)).eval()
    images = torch.randn(3, 3, 32, 32)
    fk.integrations.patch_transformers(model)
    with packed_calls() as calls:
        assert len(model(images, output_hidden_states=True).hidden_states) == 3
        assert len(calls) == 2
        model.set_attn_implementation("eager")
        weights = model(images, output_attentions=True).attentions
    assert [tuple(each.shape) for each in weights] == 2 * [(3, 2, 17, 17)]
    assert len(calls) == 2


def test_a_registered_attention_function_is_called(
    packed_calls: PackedCalls, monkeypatch: pytest.MonkeyPatch
) -> None:
    def mean_of_values(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any
    ) -> Any:
        return value.mean(2, keepdim=True).expand_as(value).transpose(1, 2), None

    monkeypatch.setitem(AttentionInterface._global_mapping, "mean_of_values", mean_of_values)
    model = ijepa()
    images = torch.randn(3, 3, 32, 32)
    fk.integrations.patch_transformers(model)
    model.set_attn_implementation("mean_of_values")
    with packed_calls() as calls:
        out = model(images).last_hidden_state
    assert not calls
    plain = IJepaModel(model.config).eval()
    with pytest.warns(UserWarning, match="implementation is 'mean_of_values'"):
        fk.integrations.patch_transformers(plain)
    plain.load_state_dict(model.state_dict())
    assert torch.equal(plain(images).last_hidden_state, out)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("batch", "projected"), [(1, 3), (2, 0)])
def test_weights_are_concatenated_where_tokens_are_many(batch: int, projected: int, bias: bool) -> None:
    """Of width 32: 16 tokens go through each projection, 32 through one GEMM."""
    model = ijepa(qkv_bias=bias, num_hidden_layers=1)
    images = torch.randn(3, 3, 32, 32)[:batch]
    expected = model(images).last_hidden_state
    fk.integrations.patch_transformers(model)
    called: set[nn.Module] = set()

    def forward(self: nn.Linear, x: Tensor) -> Tensor:
        called.add(self)
        return nn.functional.linear(x, self.weight, self.bias)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nn.Linear, "forward", forward)
        torch.testing.assert_close(model(images).last_hidden_state, expected)
    attention = model.get_submodule("layers.0.attention")
    own = {attention.get_submodule(name) for name in ("q_proj", "k_proj", "v_proj")}
    assert len(own & called) == projected


@pytest.mark.parametrize("with_bias", [("q_proj",), ("q_proj", "v_proj")])
def test_some_projections_may_have_a_bias(packed_calls: PackedCalls, with_bias: tuple[str, ...]) -> None:
    model = ijepa(qkv_bias=False)
    for module in model.modules():
        for name in with_bias:
            if hasattr(module, name):
                module.get_submodule(name).bias = nn.Parameter(torch.randn(32))
    images = torch.randn(3, 3, 32, 32)
    expected = model(images).last_hidden_state
    fk.integrations.patch_transformers(model)
    with packed_calls() as calls:
        torch.testing.assert_close(model(images).last_hidden_state, expected)
    assert len(calls) == 2


def test_projections_with_hooks_are_called(packed_calls: PackedCalls) -> None:
    model = ijepa()
    images = torch.randn(3, 3, 32, 32)
    fk.integrations.patch_transformers(model)
    query = model.get_submodule("layers.0.attention.q_proj")
    seen: list[Tensor] = []
    query.register_forward_hook(lambda module, inputs, output: seen.append(output))
    with packed_calls() as calls:
        model(images)
    assert len(seen) == 1
    assert len(calls) == 2
