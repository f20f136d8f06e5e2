from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import fastjepa_kernels as fk


def assert_is_lerp(out: Tensor, shadow: Tensor, source: Tensor, momentum: float) -> None:
    """Bit by bit: fp32 shadow + (1 - momentum) * (source - shadow), the product rounded first or fused."""
    weight, difference = np.float32(1 - momentum), source.numpy() - shadow.numpy()
    plain = shadow.numpy() + weight * difference
    fused = (shadow.double().numpy() + np.float64(weight) * np.float64(difference)).astype(np.float32)
    assert bool(((out.numpy() == plain) | (out.numpy() == fused)).all())


@pytest.mark.parametrize("momentum", [0.7, 0.9, 0.996, 0.99999])
@pytest.mark.parametrize("as_tensor", [False, True])
def test_it_is_the_linear_interpolation(momentum: float, as_tensor: bool) -> None:
    shadows = [torch.randn(3, 5), torch.randn(()), torch.randn(17), torch.randn(0), torch.randn(2, 1, 4)]
    sources = [torch.randn_like(shadow) for shadow in shadows]
    before = [shadow.clone() for shadow in shadows]
    kept = [source.clone() for source in sources]
    fk.ema_update_(shadows, sources, torch.tensor(momentum, dtype=torch.float64) if as_tensor else momentum)
    for shadow, old, source, untouched in zip(shadows, before, sources, kept, strict=True):
        assert_is_lerp(shadow, old, source, momentum)
        assert torch.equal(source, untouched)


def test_a_flat_tensor_gets_the_bits_of_a_list() -> None:
    flat, source = torch.randn(1001), torch.randn(1001)
    parts = [part.clone() for part in flat.split([1, 400, 600])]
    fk.ema_update_(flat, source, 0.99)
    fk.ema_update_(parts, list(source.split([1, 400, 600])), 0.99)
    assert torch.equal(flat, torch.cat(parts))


def test_the_ends_are_exact() -> None:
    start, source = torch.randn(100), torch.randn(100)
    shadow = start.clone()
    fk.ema_update_(shadow, source, 1.0)
    assert torch.equal(shadow, start)
    fk.ema_update_(shadow, source, 0)
    assert torch.equal(shadow, source)


def test_a_momentum_in_fp32_is_as_exact_as_it_is() -> None:
    shadow, source, momentum = torch.zeros(10), torch.ones(10), torch.tensor(0.996)
    fk.ema_update_(shadow, source, momentum)
    assert torch.equal(shadow, (1 - momentum).expand(10))


def test_bf16_source_and_working_copy_leave_the_average_in_fp32() -> None:
    # A thousandth of the way at a time, each step far below what bf16 resolves.
    shadow, source = torch.ones(64), torch.full((64,), 1.0625, dtype=torch.bfloat16)
    working = torch.zeros(64, dtype=torch.bfloat16)
    for _ in range(500):
        before = shadow.clone()
        fk.ema_update_(shadow, source, 0.999, working)
        assert_is_lerp(shadow, before, source.float(), 0.999)
    torch.testing.assert_close(shadow, torch.full((64,), 1 + 0.0625 * (1 - 0.999**500)), rtol=1e-5, atol=0)
    assert torch.equal(working, shadow.bfloat16())
    assert not torch.equal(working.float(), torch.ones(64)), "an average kept in bf16 would not have moved"


def test_float64_and_mixed_lists_keep_their_own_precision() -> None:
    shadows = [torch.zeros(3, dtype=torch.float64), torch.zeros(3)]
    fk.ema_update_(shadows, [torch.full((3,), 0.1, dtype=torch.float64)] * 2, 0.9)
    assert shadows[0].tolist() == [(1 - 0.9) * 0.1] * 3
    assert shadows[1].dtype == torch.float32


def test_strided_views_are_written_where_they_lie() -> None:
    buffer, source = torch.zeros(4, 6), torch.randn(6, 4)
    fk.ema_update_(buffer.t(), source, 0.75)
    assert torch.equal(buffer, source.t() / 4)


def test_parameters_are_moved_without_gradient() -> None:
    shadow = torch.nn.Parameter(torch.zeros(3))
    source = torch.nn.Parameter(torch.ones(3))
    fk.ema_update_([shadow], [source], 0.5)
    assert shadow.tolist() == [0.5] * 3
    assert shadow.is_leaf
    assert shadow.requires_grad


def overlapping(kind: str) -> dict[str, Any]:
    """Two arguments that share bytes; the other tensors are apart."""
    buffer = torch.zeros(10)
    apart = [torch.ones(4), torch.ones(4)]
    match kind:
        case "source is shadow":
            return {"shadow": [apart[0], buffer[:4]], "source": [apart[1], buffer[:4]]}
        case "source starts within shadow":
            return {"shadow": buffer[:4], "source": buffer[3:7]}
        case "shadow starts within a larger source":
            return {"shadow": [buffer[4:6]], "source": [buffer[1:5].view(2, 2)[:, 1]]}
        case "working is source":
            return {"shadow": apart[0], "source": buffer[:4], "working": buffer[:4]}
        case "working is shadow":
            return {"shadow": buffer[:4], "source": apart[0], "working": buffer[:4]}
        case "two shadows":
            return {"shadow": [buffer[:4], buffer[2:6]], "source": apart}
    raise AssertionError(kind)


@pytest.mark.parametrize(
    "kind",
    [
        "source is shadow",
        "source starts within shadow",
        "shadow starts within a larger source",
        "working is source",
        "working is shadow",
        "two shadows",
    ],
)
def test_shared_memory_is_refused_before_anything_is_written(kind: str) -> None:
    arguments = overlapping(kind)
    tensors = [t for value in arguments.values() for t in ([value] if isinstance(value, Tensor) else value)]
    before = [tensor.clone() for tensor in tensors]
    with pytest.raises(ValueError, match="must not share memory"):
        fk.ema_update_(momentum=0.5, **arguments)
    assert all(torch.equal(tensor, old) for tensor, old in zip(tensors, before, strict=True))


def test_neighbours_and_shared_sources_are_not_overlaps() -> None:
    buffer = torch.zeros(9)
    one = torch.ones(3)
    fk.ema_update_([buffer[:3], buffer[3:6]], [one, one], 0.5, [buffer[6:], torch.zeros(3)])
    assert buffer.tolist() == [0.5] * 9
    fk.ema_update_([], [], 0.5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"source": [torch.ones(3)]}, "source has 1 tensors, shadow has 2"),
        ({"source": [torch.ones(3), torch.ones(3)]}, r"source\[1\] must match shadow\[1\]"),
        ({"source": [torch.ones(3), torch.ones(2, device="meta")]}, r"source\[1\] must match .* meta"),
        ({"source": [torch.ones(3), torch.ones(2).long()]}, r"source\[1\] must be floating point"),
        ({"shadow": [torch.zeros(3).long(), torch.zeros(2)]}, r"shadow\[0\] must be floating point"),
        ({"working": [torch.ones(3)]}, "working has 1 tensors"),
        ({"working": [torch.ones(3), torch.ones(3)]}, r"working\[1\] must match"),
        ({"working": [torch.ones(3), torch.ones(2).int()]}, r"working\[1\] must be floating point"),
        ({"momentum": 1.01}, r"must lie in \[0, 1\], got 1.01"),
        ({"momentum": -0.1}, r"must lie in \[0, 1\]"),
        ({"momentum": float("nan")}, r"must lie in \[0, 1\]"),
        ({"momentum": torch.tensor([0.5])}, "momentum must be a float, or 0-d"),
        ({"momentum": torch.tensor(0.5, device="meta")}, "on the device of shadow"),
        ({"momentum": torch.tensor(1)}, "momentum must be floating point"),
    ],
)
def test_wrong_arguments_are_named_before_anything_is_written(
    arguments: dict[str, Any], message: str
) -> None:
    shadow = [torch.zeros(3), torch.zeros(2)]
    given = {"shadow": shadow, "source": [torch.ones(3), torch.ones(2)], "momentum": 0.5, **arguments}
    with pytest.raises(ValueError, match=message):
        fk.ema_update_(**given)
    assert not any(tensor.any() for tensor in shadow)
