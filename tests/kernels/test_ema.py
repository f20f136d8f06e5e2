from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import fastjepa_kernels as fk
from fastjepa_kernels import ema_triton

IMPLEMENTATIONS = fk.implementations("ema_update_", "cpu")
each_implementation = pytest.mark.parametrize("implementation", IMPLEMENTATIONS)


@pytest.fixture
def use(implementation: str) -> Iterator[str]:
    with fk.use(implementation, strict=True):
        yield implementation


Update = Callable[[Any, Any, Any], None]


@pytest.fixture
def update(use: str) -> Update:
    """ema_update_ of plain fp32. In C++ with a copy, because without one it leaves that to torch."""

    def run(shadow: Any, source: Any, momentum: float | Tensor) -> None:
        shadows = [shadow] if isinstance(shadow, Tensor) else shadow
        copies = [torch.full_like(average, torch.nan) for average in shadows] if use == "cpp" else None
        fk.ema_update_(shadow, source, momentum, copies)
        assert copies is None or all(map(torch.equal, copies, shadows))

    return run


def assert_is_lerp(out: Tensor, shadow: Tensor, source: Tensor, momentum: float) -> None:
    """Bit by bit: fp32 shadow + (1 - momentum) * (source - shadow), the product rounded first or fused."""
    weight, difference = np.float32(1 - momentum), source.numpy() - shadow.numpy()
    plain = shadow.numpy() + weight * difference
    fused = (shadow.double().numpy() + np.float64(weight) * np.float64(difference)).astype(np.float32)
    assert bool(((out.numpy() == plain) | (out.numpy() == fused)).all())


@each_implementation
@pytest.mark.parametrize("momentum", [0.7, 0.9, 0.996, 0.99999])
@pytest.mark.parametrize("as_tensor", [False, True])
def test_it_is_the_linear_interpolation(update: Update, momentum: float, as_tensor: bool) -> None:
    shadows = [torch.randn(3, 5), torch.randn(()), torch.randn(17), torch.randn(0), torch.randn(2, 1, 4)]
    sources = [torch.randn_like(shadow) for shadow in shadows]
    before = [shadow.clone() for shadow in shadows]
    kept = [source.clone() for source in sources]
    update(shadows, sources, torch.tensor(momentum, dtype=torch.float64) if as_tensor else momentum)
    for shadow, old, source, untouched in zip(shadows, before, sources, kept, strict=True):
        assert_is_lerp(shadow, old, source, momentum)
        assert torch.equal(source, untouched)


@each_implementation
def test_a_flat_tensor_gets_the_bits_of_a_list(update: Update) -> None:
    flat, source = torch.randn(1001), torch.randn(1001)
    parts = [part.clone() for part in flat.split([1, 400, 600])]
    update(flat, source, 0.99)
    update(parts, list(source.split([1, 400, 600])), 0.99)
    assert torch.equal(flat, torch.cat(parts))


@each_implementation
def test_the_ends_are_exact(update: Update) -> None:
    start, source = torch.randn(100), torch.randn(100)
    shadow = start.clone()
    update(shadow, source, 1.0)
    assert torch.equal(shadow, start)
    update(shadow, source, 0)
    assert torch.equal(shadow, source)


@each_implementation
def test_a_momentum_in_fp32_is_as_exact_as_it_is(update: Update) -> None:
    shadow, source, momentum = torch.zeros(10), torch.ones(10), torch.tensor(0.996)
    update(shadow, source, momentum)
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


def laid_out(values: Tensor, layout: str) -> Tensor:
    """The same values in other memory."""
    match layout:
        case "contiguous":
            return values.clone(memory_format=torch.contiguous_format)
        case "reversed":
            order = tuple(reversed(range(values.ndim)))
            return values.permute(order).contiguous().permute(order)
        case "unaligned":
            return torch.cat([values.new_zeros(1), values.flatten()])[1:].view(values.shape)
        case "sliced":
            wide = torch.full((*values.shape[:-1], 2 * values.shape[-1] + 1), torch.nan, dtype=values.dtype)
            view = wide[..., 1::2]
            view.copy_(values)
            return view
    raise AssertionError(layout)


LAYOUTS = st.sampled_from(["contiguous", "contiguous", "reversed", "unaligned", "sliced"])
HALF = [torch.float32, torch.float16]
SHAPES = st.lists(st.integers(0, 9), min_size=1, max_size=3) | st.just([40, 71])


@each_implementation
@settings(deadline=None, max_examples=25)
@given(
    st.lists(st.tuples(SHAPES, LAYOUTS, LAYOUTS, LAYOUTS, *[st.sampled_from(HALF)] * 2), max_size=4),
    st.floats(0, 1),
    st.sampled_from([None, torch.float32, torch.float64, torch.float16]),
    st.booleans(),
    st.integers(0, 2**31),
)
def test_shapes_layouts_and_dtypes(
    implementation: str,
    tensors: list[tuple[list[int], str, str, str, torch.dtype, torch.dtype]],
    momentum: float,
    momentum_dtype: torch.dtype | None,
    with_working: bool,
    seed: int,
) -> None:
    torch.manual_seed(seed)
    shadows, sources, copies, expected = [], [], [], []
    given_momentum = momentum if momentum_dtype is None else torch.tensor(momentum, dtype=momentum_dtype)
    weight = 1 - float(given_momentum)
    for shape, *layouts, source_dtype, copy_dtype in tensors:
        shadows.append(laid_out(torch.randn(shape), layouts[0]))
        sources.append(laid_out(torch.randn(shape).to(source_dtype), layouts[1]))
        copies.append(laid_out(torch.full(shape, torch.nan, dtype=copy_dtype), layouts[2]))
        expected.append(torch.lerp(shadows[-1].double(), sources[-1].double(), weight))
    kept = [source.clone() for source in sources]
    with fk.use(implementation):
        fk.ema_update_(shadows, sources, given_momentum, copies if with_working else None)
    for shadow, copy, wanted in zip(shadows, copies, expected, strict=True):
        torch.testing.assert_close(shadow.double(), wanted, rtol=2e-7, atol=4e-7)
        if with_working:
            assert torch.equal(copy, shadow.to(copy.dtype))
        else:
            assert bool(copy.isnan().all())
        base = shadow._base
        if base is not None and base.numel() > 2 * shadow.numel() > 0:  # sliced: what lies between stays
            assert bool(base[..., ::2].isnan().all())
    assert all(torch.equal(source, before) for source, before in zip(sources, kept, strict=True))


@pytest.mark.skipif("cpp" not in IMPLEMENTATIONS, reason="needs the extension")
def test_what_cpp_leaves_to_torch_is_not_called_cpp() -> None:
    shadow = torch.randn(5)
    before = shadow.clone()
    with fk.use("cpp", strict=True), pytest.raises(ValueError, match=r"cannot run as .cpp. .* can as torch"):
        fk.ema_update_(shadow, torch.randn(5), 0.5)
    assert torch.equal(shadow, before)


def test_plain_torch_is_torch_lerp_bit_by_bit() -> None:
    for momentum in (0.1, 0.5, 0.9, 0.9999):
        shadow, source = torch.randn(1003), torch.randn(1003)
        expected = torch.lerp(shadow, source, 1 - momentum)
        with fk.use("torch"):
            fk.ema_update_(shadow, source, momentum)
        assert torch.equal(shadow, expected)


def test_an_average_in_half_precision_is_computed_in_fp32() -> None:
    for dtype in (torch.bfloat16, torch.float16):
        shadow, source = torch.randn(300).to(dtype), torch.randn(300)
        exact = torch.lerp(shadow.float(), source, 1 - 0.9)
        fk.ema_update_(shadow, source, 0.9)
        assert torch.equal(shadow, exact.to(dtype))


@each_implementation
@pytest.mark.usefixtures("use")
def test_more_elements_than_a_program_takes() -> None:
    sizes = [2 * ema_triton._CHUNK + 5, 3, ema_triton._CHUNK, 1027]
    shadow, source = torch.randn(sum(sizes)), torch.randn(sum(sizes)).half()
    working = torch.full((sum(sizes),), torch.nan, dtype=torch.float16)
    before = shadow.clone()
    fk.ema_update_(list(shadow.split(sizes)), list(source.split(sizes)), 0.99, list(working.split(sizes)))
    assert_is_lerp(shadow, before, source.float(), 0.99)
    assert torch.equal(working, shadow.half())


@pytest.mark.skipif("triton" not in IMPLEMENTATIONS, reason="needs Triton's interpreter")
def test_the_table_is_made_once_for_the_same_tensors() -> None:
    shadows, sources = [torch.randn(8), torch.randn(9)], [torch.randn(8), torch.randn(9)]
    with fk.use("triton", strict=True):
        fk.ema_update_(shadows, sources, 0.9)
        made = ema_triton._launches.cache_info().misses
        for momentum in (0.8, torch.tensor(0.7)):
            fk.ema_update_(shadows, sources, momentum)
        assert ema_triton._launches.cache_info().misses == made
        # The same addresses, but not the same tensors.
        before = shadows[1].clone()
        fk.ema_update_([shadows[1][:4]], [sources[1][:4]], 0.75)
        assert ema_triton._launches.cache_info().misses == made + 1
        assert torch.equal(shadows[1][4:], before[4:])
        assert_is_lerp(shadows[1][:4], before[:4], sources[1][:4], 0.75)


@pytest.mark.usefixtures("use")
@pytest.mark.parametrize(
    ("implementation", "with_working"),
    [(name, copies) for name in IMPLEMENTATIONS for copies in (False, True) if copies or name != "cpp"],
)
def test_the_op_is_registered_as_torch_wants_it(with_working: bool) -> None:
    shadow, source = [torch.randn(3, 2), torch.randn(5)], [torch.randn(3, 2), torch.randn(5)]
    working = [torch.randn(3, 2).half(), torch.randn(5)] if with_working else []
    name = fk.choice.preference()
    arguments: tuple[Any, ...] = (shadow, source, working, 0.9, None, None, 0, None, [], [], name)
    torch.library.opcheck(torch.ops.fastjepa.ema_update_.default, arguments)
    versions = [tensor._version for tensor in (*shadow, *source)]
    with FlopCounterMode(display=False) as counter:
        fk.ema_update_(shadow, source, 0.9, working or None)
    assert counter.get_total_flops() == 0
    assert all(tensor._version > version for tensor, version in zip(shadow, versions, strict=False))
    assert [tensor._version for tensor in source] == versions[2:]


def test_the_op_with_rounding_is_registered_as_torch_wants_it() -> None:
    shadow, source = [torch.randn(3, 2).bfloat16()], [torch.randn(3, 2)]
    momentum, step = torch.tensor(0.9), torch.tensor(4)
    for implementation in ("torch", "triton"):
        arguments: tuple[Any, ...] = (shadow, source, [], 0.0, momentum, 7, 0, step, [0], [3], implementation)
        torch.library.opcheck(torch.ops.fastjepa.ema_update_.default, arguments)


def test_it_compiles_without_a_break() -> None:
    def train(shadows: list[Tensor], sources: list[Tensor], momentum: Any, copies: list[Tensor]) -> Tensor:
        fk.ema_update_(shadows, [source * 2 for source in sources], momentum, copies)
        return shadows[0].sum() + copies[1].sum()

    compiled = torch.compile(train, fullgraph=True, backend="aot_eager")
    for momentum in (0.9, 0.99, 0.996, torch.tensor(0.5)):
        shadows, sources = [torch.randn(3, 2), torch.randn(4)], [torch.randn(3, 2), torch.randn(4)]
        copies = [torch.randn(3, 2).half(), torch.randn(4)]
        again = [[tensor.clone() for tensor in tensors] for tensors in (shadows, copies)]
        out = compiled(shadows, sources, momentum, copies)
        expected = train(again[0], sources, momentum, again[1])
        assert torch.equal(out, expected)
        assert all(torch.equal(a, b) for a, b in zip(shadows + copies, again[0] + again[1], strict=True))


def test_it_compiles_with_rounding() -> None:
    def train(shadow: Tensor, source: Tensor, step: Tensor) -> None:
        fk.ema_update_(shadow, source, 0.9, rounding=fk.StochasticRounding(3, step, offsets=[6]))

    source = torch.randn(50)
    shadow = torch.randn(50).bfloat16()
    again = shadow.clone()
    torch.compile(train, fullgraph=True, backend="aot_eager")(shadow, source, torch.tensor(5))
    train(again, source, torch.tensor(5))
    assert torch.equal(shadow, again)


@each_implementation
def test_parameters_are_moved_without_gradient(update: Update) -> None:
    shadow = torch.nn.Parameter(torch.zeros(3))
    source = torch.nn.Parameter(torch.ones(3))
    update([shadow], [source], 0.5)
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
        case "an expanded shadow":
            return {"shadow": buffer[:1].expand(4), "source": apart[0]}
        case "rows of an expanded working copy":
            return {
                "shadow": torch.ones(2, 4),
                "source": torch.ones(2, 4),
                "working": buffer[:4].expand(2, 4),
            }
        case "columns that cross":
            whole = buffer[:8].view(2, 4)
            return {
                "shadow": [whole[:, :3]],
                "source": [whole[:, 2:].repeat(1, 2)[:, :3]],
                "working": [whole[:, 1:]],
            }
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
        "an expanded shadow",
        "rows of an expanded working copy",
        "columns that cross",
    ],
)
def test_shared_memory_is_refused_before_anything_is_written(kind: str) -> None:
    arguments = overlapping(kind)
    tensors = [t for value in arguments.values() for t in ([value] if isinstance(value, Tensor) else value)]
    before = [tensor.clone() for tensor in tensors]
    with pytest.raises(ValueError, match=r"(shadow|working)\[\d\].* must not share memory"):
        fk.ema_update_(momentum=0.5, **arguments)
    assert all(torch.equal(tensor, old) for tensor, old in zip(tensors, before, strict=True))


def test_neighbours_and_shared_sources_are_not_overlaps() -> None:
    buffer = torch.zeros(9)
    one = torch.ones(3)
    fk.ema_update_([buffer[:3], buffer[3:6]], [one, one], 0.5, [buffer[6:], torch.zeros(3)])
    assert buffer.tolist() == [0.5] * 9
    fk.ema_update_([], [], 0.5)


def test_neighbouring_columns_are_not_overlaps() -> None:
    whole, source = torch.zeros(5, 7), torch.ones(4)
    columns = [whole[:, :3], whole[:, 3:6:2], whole[:, 4:5]]
    fk.ema_update_(columns, [source[:1].expand_as(column) for column in columns], 0.5)
    assert torch.equal(whole, torch.tensor([0.5, 0.5, 0.5, 0.5, 0.5, 0.5, 0.0]).expand(5, 7))


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
        ({"momentum": torch.tensor(1.5)}, r"must lie in \[0, 1\], got 1.5"),
        ({"momentum": torch.tensor(-0.5, dtype=torch.float64)}, r"must lie in \[0, 1\], got -0.5"),
        ({"momentum": torch.tensor(torch.nan)}, r"must lie in \[0, 1\], got nan"),
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


def made_in_inference_mode(*shape: int) -> Tensor:
    with torch.inference_mode():
        return torch.zeros(shape)


@pytest.mark.parametrize("wrong", ["shadow", "working"])
def test_tensors_of_inference_mode_are_refused_outside_of_it_before_anything_is_written(wrong: str) -> None:
    tensors: dict[str, Any] = {name: [torch.zeros(3), torch.zeros(2)] for name in ("shadow", "working")}
    tensors[wrong][1] = made_in_inference_mode(2)
    source = [torch.ones(3), made_in_inference_mode(2)]
    with pytest.raises(ValueError, match=rf"{wrong}\[1\] was made in torch.inference_mode"):
        fk.ema_update_(source=source, momentum=0.5, **tensors)
    assert not any(tensor.any() for tensor in (*tensors["shadow"], *tensors["working"]))


def test_an_average_can_be_made_and_moved_in_inference_mode() -> None:
    shadow = made_in_inference_mode(3)
    with torch.inference_mode():
        fk.ema_update_(shadow, torch.ones(3), 0.5)
    assert shadow.tolist() == [0.5] * 3
    fk.ema_update_(average := torch.zeros(3), shadow, 0.5)
    assert average.tolist() == [0.25] * 3
