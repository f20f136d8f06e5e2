"""However blocks are run, they compute the same."""

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

from fastjepa.models import Predictor, Stack, VisionTransformer, ViTShape, equal_sequences

SHAPE = ViTShape((16, 24), 4, 48, 3, 2)


def stack(depth: int = 2) -> Stack:
    torch.manual_seed(0)
    return Stack(depth, 48, 2).double()


def outcome(blocks: Stack, x: Tensor, rows: Tensor | None = None) -> list[Tensor]:
    x = x.clone().requires_grad_()
    y, added = blocks.run(x, equal_sequences(3, 5, x.device), rows)
    out = y if added is None else y + added
    return [out, *torch.autograd.grad(out.square().sum(), [x, *blocks.parameters()])]


def assert_same(one: list[Tensor], other: list[Tensor]) -> None:
    for found, expected in zip(one, other, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("rows", [None, torch.tensor([14, 2, 7])])
def test_fused_and_plain_and_recomputed(rows: Tensor | None) -> None:
    blocks, x = stack(), torch.randn(15, 48).double()
    fused = outcome(blocks, x, rows)
    blocks.recompute = True
    assert_same(outcome(blocks, x, rows), fused)
    blocks.is_fused = False
    assert not any(block.is_fused for block in blocks)
    assert_same(outcome(blocks, x, rows), fused)
    blocks.recompute = False
    assert_same(outcome(blocks, x, rows), fused)


def test_rows_are_the_rows_of_all() -> None:
    blocks, x, rows = stack(), torch.randn(15, 48).double(), torch.tensor([3, 11])
    torch.testing.assert_close(outcome(blocks, x, rows)[0], outcome(blocks, x)[0][rows])


def test_without_a_block_nothing_is_added() -> None:
    x = torch.randn(15, 48).double()
    y, added = Stack(0, 48, 2).run(x, equal_sequences(3, 5, x.device))
    assert y is x
    assert added is None


def test_a_block_alone_is_its_two_parts() -> None:
    (block,), x = stack(1).blocks(), torch.randn(15, 48).double()
    sequences = equal_sequences(3, 5, x.device)
    y, added = block.finish(*block.begin(x, None), sequences)
    torch.testing.assert_close(block(x, sequences=sequences), (y, added))


def test_autocast_takes_the_plain_modules() -> None:
    blocks, x = stack().float(), torch.randn(15, 48)
    called: list[nn.Module] = []
    norm = blocks.blocks()[0].norm1
    norm.register_forward_hook(lambda module, *_: called.append(module))
    with torch.autocast("cpu", torch.bfloat16):
        blocks.run(x, equal_sequences(3, 5, x.device))
    assert called == [norm]


@pytest.mark.parametrize("index", [slice(2), slice(-2, None), slice(None, None, 2), slice(0)])
def test_a_slice_is_a_stack_of_the_same_blocks(index: slice) -> None:
    blocks, x = stack(3), torch.randn(15, 48).double()
    blocks.recompute = True
    some = blocks[index]
    assert isinstance(some, Stack)
    assert list(some) == list(blocks)[index]
    assert some.recompute
    expected = x
    for block in blocks.blocks()[index]:
        expected = torch.add(*block(expected, sequences=equal_sequences(3, 5, x.device)))
    y, added = some.run(x, equal_sequences(3, 5, x.device))
    torch.testing.assert_close(y if added is None else y + added, expected)
    assert blocks[-1] is blocks.blocks()[2]


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda blocks: pickle.loads(pickle.dumps(blocks))])
def test_a_copy_of_compiled_blocks_has_its_own_weights(copied: Callable[[Stack], Stack]) -> None:
    torch._dynamo.reset()
    blocks, x = stack(), torch.randn(15, 48).double()
    expected = outcome(blocks, x)
    counter = CompileCounterWithBackend("eager")
    compiled(nn.ModuleList([blocks]), counter)
    assert_same(outcome(blocks, x), expected)
    assert counter.frame_count > 0
    twin = copied(blocks)
    with torch.no_grad():
        for parameter in blocks.parameters():
            parameter.zero_()
    assert_same(outcome(twin, x), expected)
    frames = counter.frame_count
    compiled(nn.ModuleList([twin]), counter)
    assert_same(outcome(twin, x), expected)
    assert counter.frame_count >= frames
    assert not outcome(blocks, x)[1].equal(expected[1])


def compiled(model: Any, counter: CompileCounterWithBackend) -> None:
    for module in model.modules():
        if isinstance(module, Stack):
            module.compile_blocks(backend=counter)


def test_compiled_blocks_have_no_break_and_few_compilations() -> None:
    """fullgraph raises at a break. Twelve steps of as many shapes, in training and evaluation."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    encoder, predictor = VisionTransformer(SHAPE), Predictor(SHAPE.grid, 48, 32, 3, 2)
    images = torch.randn(3, 3, 16, 24)
    counter = CompileCounterWithBackend("aot_eager")

    def step(kept: int, asked: int) -> list[Tensor]:
        context = torch.arange(kept).expand(3, -1)
        targets = torch.arange(asked).expand(2, 3, -1)
        loss = predictor(encoder(images, context), context, targets).square().mean()
        with torch.no_grad():
            whole = encoder(images)
        return [loss, whole, *torch.autograd.grad(loss, [*encoder.parameters(), *predictor.parameters()])]

    shapes = [(4 + number, 3 + number % 5) for number in range(12)]
    plain = [step(*shape) for shape in shapes]
    compiled(encoder, counter)
    compiled(predictor, counter)
    for shape, expected in zip(shapes, plain, strict=True):
        for one, other in zip(step(*shape), expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    # begin and finish, of three kinds: the encoder with gradient and without, the predictor. The first block
    # has nothing to add, the last one may take rows, and sizes of 0 and 1 are none here.
    assert counter.frame_count <= 18
