"""When a block takes its passes from the kernels, and when it calls its layers."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.utils import parametrizations

from fastjepa.models import Sequences, Stack
from fastjepa.models.block import Block, add_norm
from fastjepa_kernels import block as fused

LAYERS = ["norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2"]
WIDTH = 48


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Which parts the kernels took."""
    seen: list[str] = []

    def watch(name: str) -> Callable[..., Any]:
        run = getattr(fused, name)

        def watched(*arguments: Any) -> Any:
            seen.append(name)
            return run(*arguments)

        return watched

    for name in ("add_norm_linear", "attend_and_feed", "add_norm"):
        monkeypatch.setattr(fused, name, watch(name))
    return seen


def cut() -> Sequences:
    return Sequences(torch.tensor([0, 5, 15], dtype=torch.int32), 10)


def run(block: Block, x: Tensor) -> Tensor:
    return torch.add(*block(x, sequences=cut()))


def part_of(layer: str) -> str:
    return "add_norm_linear" if layer in ("norm1", "attn.qkv") else "attend_and_feed"


def other_part(layer: str) -> list[str]:
    return [name for name in ("add_norm_linear", "attend_and_feed") if name != part_of(layer)]


def test_a_block_as_it_is_made_is_fused(calls: list[str]) -> None:
    run(Block(WIDTH, 2), torch.randn(15, WIDTH))
    add_norm(nn.LayerNorm(WIDTH), torch.randn(15, WIDTH), None, True)
    assert calls == ["add_norm_linear", "attend_and_feed", "add_norm"]


HOOKS: dict[str, Callable[[nn.Module, Any], Any]] = {
    "forward": nn.Module.register_forward_hook,
    "forward pre": nn.Module.register_forward_pre_hook,
    "backward": nn.Module.register_full_backward_hook,
    "backward pre": nn.Module.register_full_backward_pre_hook,
}


@pytest.mark.parametrize("kind", HOOKS)
@pytest.mark.parametrize("layer", [*LAYERS, "mlp"])
def test_hooks_are_called(layer: str, kind: str, calls: list[str]) -> None:
    block, called = Block(WIDTH, 2), []
    handle = HOOKS[kind](block.get_submodule(layer), lambda *_: called.append(1))
    x = torch.randn(15, WIDTH, requires_grad=True)
    run(block, x).square().sum().backward()
    assert called == [1]
    assert calls == other_part(layer)
    handle.remove()
    calls.clear()
    run(block, x)
    assert len(calls) == 2


class LowRank(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + x.sum(dim=1, keepdim=True)


def low_rank(layer: nn.Module) -> nn.Module:
    assert isinstance(layer, nn.Linear)
    adapted = LowRank(layer.in_features, layer.out_features)
    adapted.load_state_dict(layer.state_dict())
    return adapted


def no_bias(layer: nn.Module) -> nn.Module:
    assert isinstance(layer, nn.Linear)
    return nn.Linear(layer.in_features, layer.out_features, bias=False)


def patched(layer: nn.Module) -> nn.Module:
    forward = layer.forward
    layer.forward = lambda x: 2 * forward(x)
    return layer


@pytest.mark.parametrize("replace", [low_rank, no_bias, patched, parametrizations.weight_norm])
@pytest.mark.parametrize("layer", [name for name in LAYERS if not name.startswith("norm")])
def test_replaced_layers_are_called(
    layer: str, replace: Callable[[nn.Module], nn.Module], calls: list[str]
) -> None:
    block, x = Block(WIDTH, 2), torch.randn(15, WIDTH)
    block.set_submodule(layer, replace(block.get_submodule(layer)))
    found = run(block, x)
    assert calls == other_part(layer)
    block.is_fused = False
    torch.testing.assert_close(found, run(block, x))


def test_a_replaced_mlp_and_norms_without_weights_are_called(calls: list[str]) -> None:
    block, x = Block(WIDTH, 2), torch.randn(15, WIDTH)
    block.mlp = nn.Identity()  # type: ignore[assignment]
    block.norm1 = nn.LayerNorm(WIDTH, elementwise_affine=False)
    run(block, x)
    add_norm(block.norm1, x, x, True)
    assert calls == []


def test_norms_in_another_dtype_are_called(calls: list[str]) -> None:
    block, x = Block(WIDTH, 2).bfloat16(), torch.randn(15, WIDTH).bfloat16()
    block.norm1.float()
    assert run(block, x).dtype == torch.bfloat16
    assert calls == ["attend_and_feed"]


def test_the_meta_device(calls: list[str]) -> None:
    blocks = Stack(2, WIDTH, 2).to("meta")
    x = torch.empty(15, WIDTH, device="meta", requires_grad=True)
    y, added = blocks.run(x, Sequences(cut().cu_seqlens.to("meta"), 10))
    out = blocks.finish(nn.LayerNorm(WIDTH, device="meta"), y, added)
    out.square().sum().backward()
    assert x.grad is not None
    assert out.shape == x.grad.shape == (15, WIDTH)
    assert calls == []


def test_fake_tensors(calls: list[str]) -> None:
    with FakeTensorMode():
        blocks, x = Stack(2, WIDTH, 2), torch.randn(15, WIDTH, requires_grad=True)
        y, added = blocks.run(x, cut())
        out = blocks.finish(nn.LayerNorm(WIDTH), y, added)
        out.square().sum().backward()
    assert x.grad is not None
    assert x.grad.shape == (15, WIDTH)
    assert calls == []


def test_a_copy_of_a_block_has_its_own_weights() -> None:
    torch._dynamo.reset()
    block, x = Block(WIDTH, 2), torch.randn(15, WIDTH)
    expected = run(block, x)
    block.compile_parts(backend="eager")
    twin = copy.deepcopy(block)
    assert block.compiled is not None
    assert twin.compiled is None
    with torch.no_grad():
        block.mlp.fc1.weight.zero_()
    torch.testing.assert_close(run(twin, x), expected)
