from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import fastjepa_kernels as fk
from fastjepa_kernels.language import tl, triton
from fastjepa_kernels.quantize import to_e4m3

FP8 = torch.float8_e4m3fn
IMPLEMENTATIONS = fk.implementations("quantize_rows_", "cpu")
each_implementation = pytest.mark.parametrize("implementation", IMPLEMENTATIONS)


@pytest.fixture
def use(implementation: str) -> Iterator[str]:
    with fk.use(implementation, strict=True):
        yield implementation


def quantized(x: Tensor) -> tuple[Tensor, Tensor]:
    """In memory of NaN."""
    out = torch.full((*x.shape,), torch.nan).to(FP8)
    scale = torch.full((len(x),), torch.nan)
    fk.quantize_rows_(x, out, scale)
    return out, scale


@each_implementation
@settings(deadline=None, max_examples=25)
@given(
    st.integers(0, 7),
    st.integers(0, 40),
    st.sampled_from([torch.float32, torch.float16]),
    st.sampled_from([1e-30, 1e-3, 1.0, 1e4]),
    st.integers(0, 2**31),
)
def test_every_element_is_within_its_bound(
    implementation: str, rows: int, columns: int, dtype: torch.dtype, size: float, seed: int
) -> None:
    torch.manual_seed(seed)
    # From elements like the largest to ones far below the smallest step.
    x = (torch.randn(rows, columns) * size * 2.0 ** torch.randint(-14, 1, (rows, columns))).to(dtype)
    with fk.use(implementation, strict=True):
        out, scale = quantized(x)
    exact, back = x.double(), out.double() * scale[:, None].double()
    bound = torch.maximum(exact.abs() * 2**-4, scale[:, None].double() * 2**-10) * (1 + 2**-20)
    assert bool(((back - exact).abs() <= bound).all())
    if columns:
        largest, place = exact.abs().max(dim=1)
        scaled = out.double().gather(1, place[:, None])[:, 0]
        present = largest > 1e-34
        assert bool((scaled.abs()[present] == 448).all())
        torch.testing.assert_close(scale.double()[present], largest[present] / 448, rtol=2**-23, atol=0)


@each_implementation
@pytest.mark.usefixtures("use")
def test_powers_of_two_are_exact_where_the_largest_is_448_of_one() -> None:
    x = torch.cat([torch.tensor([448.0]), 2.0 ** torch.arange(-9, 9), torch.zeros(2)])
    x = torch.stack([x, -x, x * 2.0**-100, x * 2.0**100])
    out, scale = quantized(x)
    assert scale.tolist() == [1.0, 1.0, 2.0**-100, 2.0**100]
    assert torch.equal(out.float() * scale[:, None], x)


@each_implementation
@pytest.mark.usefixtures("use")
def test_rows_of_zeros_and_of_what_is_hardly_more() -> None:
    x = torch.zeros(3, 20)
    x[1, 3] = 1e-42
    x[2, 4] = -1e-38
    out, scale = quantized(x)
    assert scale.tolist() == [2.0**-126] * 3
    back = out.double() * scale[:, None].double()
    assert bool(
        ((back - x.double()).abs() <= torch.maximum(x.double().abs() * 2**-4, scale[0] * 2**-10)).all()
    )
    assert bool((out[0].float() == 0).all())


@each_implementation
@pytest.mark.usefixtures("use")
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # numpy's, on inf / inf
def test_what_is_not_finite_shows_in_its_row_alone() -> None:
    x = torch.randn(4, 9)
    x[0, 2], x[1, 3], x[2, 8] = torch.nan, torch.inf, -torch.inf
    out, scale = quantized(x)
    assert bool((out.float() * scale[:, None])[:3].isnan().all())
    assert bool((out.float() * scale[:, None])[3].isfinite().all())


@pytest.mark.skipif("triton" not in IMPLEMENTATIONS, reason="needs Triton's interpreter")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("shape", [(1, 1), (5, 33), (3, 2050), (130, 16)])
def test_triton_gives_the_bits_of_torch(dtype: torch.dtype, shape: tuple[int, int]) -> None:
    x = (torch.randn(shape) * 2.0 ** torch.randint(-14, 1, shape)).to(dtype)
    with fk.use("triton", strict=True):
        out, scale = quantized(x)
    with fk.use("torch", strict=True):
        expected, expected_scale = quantized(x)
    assert torch.equal(out.view(torch.uint8), expected.view(torch.uint8))
    assert torch.equal(scale, expected_scale)


@triton.jit
def _cast_kernel(value: Any, out: Any, BLOCK: tl.constexpr) -> None:
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + at, to_e4m3(tl.load(value + at), HARDWARE=False))


@pytest.mark.skipif("triton" not in IMPLEMENTATIONS, reason="needs Triton's interpreter")
def test_the_cast_rounds_every_midpoint_to_even() -> None:
    codes = torch.arange(127, dtype=torch.uint8).view(FP8).float()  # 0 to 448
    middle = (codes[1:] + codes[:-1]) / 2
    up, down = torch.tensor(torch.inf), torch.tensor(0.0)
    near = torch.cat([codes, middle, torch.nextafter(middle, up), torch.nextafter(middle, down)])
    value = torch.cat([near, -near, torch.rand(521) * 448, torch.tensor([torch.nan])])
    value = torch.cat([value, torch.zeros(-len(value) % 64)])
    out = torch.full(value.shape, 255, dtype=torch.uint8)
    _cast_kernel[(len(value) // 64,)](value, out, BLOCK=64)
    assert torch.equal(out & 0x7F, value.to(FP8).view(torch.uint8) & 0x7F)
    numbers = ~value.isnan()
    assert torch.equal(out[numbers], value.to(FP8).view(torch.uint8)[numbers])


@each_implementation
def test_strides_do_not_matter(implementation: str) -> None:
    x = torch.randn(12, 14)[::2, 1:12]
    expected, expected_scale = quantized(x.contiguous())
    out = torch.full((22, 6), torch.nan).to(FP8).t()[:, ::2]
    scale = torch.full((12,), torch.nan)
    with fk.use(implementation):
        fk.quantize_rows_(x, out, scale[::2])
        assert torch.equal(out.float(), expected.float())
        assert torch.equal(scale[::2], expected_scale)
        assert bool(scale[1::2].isnan().all())
        assert torch.equal(quantized(x.t().contiguous().t())[0].float(), expected.float())


def test_float64_and_rows_longer_than_registers_hold() -> None:
    x = torch.randn(2, 20_000, dtype=torch.float64)
    out, scale = quantized(x)
    torch.testing.assert_close(scale.double(), x.abs().amax(dim=1) / 448)
    assert bool(
        ((out.double() * scale[:, None] - x).abs() <= (x.abs() * 2**-4 + scale[:, None] * 2**-10)).all()
    )


@each_implementation
@pytest.mark.usefixtures("use")
def test_the_op_is_registered_as_torch_wants_it() -> None:
    x, out, scale = torch.randn(3, 8), torch.zeros(3, 8).to(FP8), torch.zeros(3)
    torch.library.opcheck(
        torch.ops.fastjepa.quantize_rows_,
        (x, out, scale, fk.choice.preference()),
        # test_schema multiplies tensors, which fp8 does not do.
        test_utils=("test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"),
    )
    with FlopCounterMode(display=False) as counter:
        fk.quantize_rows_(x, out, scale)
    assert counter.get_total_flops() == 0


def test_it_compiles_without_a_break() -> None:
    def quantize(weight: Tensor) -> Tensor:
        out = torch.empty(weight.shape, dtype=FP8)
        scale = torch.empty(len(weight))
        fk.quantize_rows_(weight, out, scale)
        return out.float() * scale[:, None]

    weight = torch.randn(5, 16)
    compiled = torch.compile(quantize, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(weight), quantize(weight))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"x": torch.ones(4)}, r"x must be \[R, K\], got \[4\]"),
        ({"x": torch.ones(2, 4).long()}, "x must be floating point"),
        (
            {"out": torch.zeros(2, 3).to(FP8)},
            r"out must be \[R, K\] = \[2, 4\] in float8_e4m3fn, got \[2, 3\]",
        ),
        ({"out": torch.zeros(2, 4)}, "out must be .* got .* float32"),
        ({"scale": torch.zeros(3)}, r"scale must be \[R\] = \[2\] in float32, got \[3\]"),
        ({"scale": torch.zeros(2).half()}, "scale must be .* float16"),
        ({"scale": torch.zeros(2, device="meta")}, "one device"),
    ],
)
def test_wrong_arguments_are_named_before_anything_is_written(
    arguments: dict[str, Any], message: str
) -> None:
    given = {"x": torch.ones(2, 4), "out": torch.zeros(2, 4).to(FP8), "scale": torch.zeros(2), **arguments}
    with pytest.raises(ValueError, match=message):
        fk.quantize_rows_(**given)
    assert given["scale"].is_meta or not bool(given["scale"].any())


def test_shared_memory_is_refused() -> None:
    x = torch.ones(4, 4)
    out = x.view(FP8)[:, :4]
    with pytest.raises(ValueError, match="out and x must not share memory"):
        fk.quantize_rows_(x, out, torch.zeros(4))
    assert bool((x == 1).all())


def test_a_tensor_of_inference_mode_is_refused_before_anything_is_written() -> None:
    with torch.inference_mode():
        scale = torch.full((2,), 7.0)
    out = torch.zeros(2, 4).to(torch.float8_e4m3fn)
    with pytest.raises(ValueError, match=r"scale was made in torch\.inference_mode"):
        fk.quantize_rows_(torch.randn(2, 4), out, scale)
    assert scale.tolist() == [7, 7]
    assert bool((out.float() == 0).all())
