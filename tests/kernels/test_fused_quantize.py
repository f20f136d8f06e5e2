from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import fastjepa_kernels as fk
from fastjepa_kernels.fused_quantize import _gelu
from fastjepa_kernels.language import tl, triton

FP8 = torch.float8_e4m3fn
IMPLEMENTATIONS = fk.implementations("layer_norm_quantize", "cpu")
each_implementation = pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
# Of the statistics, or of GELU, in fp32, before anything is rounded to fp8.
ROUNDING = 2e-5


@pytest.fixture
def use(implementation: str) -> Iterator[str]:
    with fk.use(implementation, strict=True):
        yield implementation


def gelu(x: Tensor) -> Tensor:
    """In float64, with all of its digits where x is far below zero."""
    x = x.double()
    return x / 2 * torch.special.erfc(-x / 2**0.5)


def assert_within_bounds(q: Tensor, scale: Tensor, exact: Tensor) -> None:
    """Of the exact result, in float64."""
    assert q.dtype == FP8
    assert scale.dtype == torch.float32
    back, step = q.double() * scale.double()[:, None], scale.double()[:, None] * 2**-10
    largest = exact.abs().amax(dim=1)
    off = ROUNDING * (1 + largest)[:, None]
    bound = torch.maximum(exact.abs() * 2**-4, step) * (1 + 2**-10) + off
    assert bool(((back - exact).abs() <= bound).all())
    torch.testing.assert_close(scale.double(), largest / 448, rtol=2e-5, atol=ROUNDING / 448)


@each_implementation
@settings(deadline=None, max_examples=25)
@given(
    st.integers(0, 7),
    st.integers(1, 90),
    st.sampled_from([torch.float32, torch.float16]),
    st.sampled_from([torch.float32, torch.float16]),
    st.booleans(),
    st.integers(0, 2**31),
)
def test_layer_norm_is_within_its_bound(
    implementation: str,
    tokens: int,
    width: int,
    dtype: torch.dtype,
    weight_dtype: torch.dtype,
    with_residual: bool,
    seed: int,
) -> None:
    torch.manual_seed(seed)
    x = (3 * torch.randn(tokens, width) + 1).to(dtype)
    residual = torch.randn(tokens, width).to(dtype) if with_residual else None
    weight, bias = ((1 + torch.randn(width)).to(weight_dtype) for _ in range(2))
    with fk.use(implementation, strict=True):
        q, scale, *total = fk.layer_norm_quantize(x, weight, bias, 1e-2, residual)
    if residual is not None:
        assert torch.equal(total[0], x + residual)
        x = total[0]
    else:
        assert total == []
    exact = F.layer_norm(x.double(), (width,), weight.double(), bias.double(), 1e-2)
    assert_within_bounds(q, scale, exact)


@each_implementation
@settings(deadline=None, max_examples=25)
@given(
    st.integers(0, 7),
    st.integers(1, 90),
    st.sampled_from([torch.float32, torch.float16]),
    st.sampled_from([1e-3, 1.0, 8.0]),
    st.integers(0, 2**31),
)
def test_gelu_is_within_its_bound(
    implementation: str, tokens: int, width: int, dtype: torch.dtype, size: float, seed: int
) -> None:
    torch.manual_seed(seed)
    x = (torch.randn(tokens, width) * size).to(dtype)
    with fk.use(implementation, strict=True):
        q, scale = fk.gelu_quantize(x)
    assert_within_bounds(q, scale, gelu(x))


@each_implementation
@pytest.mark.usefixtures("use")
@pytest.mark.parametrize("width", [768, 1408, 3072])
def test_rows_of_two_blocks_are_whole(width: int) -> None:
    x, weight, bias = torch.randn(3, width), torch.randn(width), torch.randn(width)
    q, scale = fk.layer_norm_quantize(x, weight, bias)
    assert_within_bounds(q, scale, F.layer_norm(x.double(), (width,), weight.double(), bias.double(), 1e-6))
    assert_within_bounds(*fk.gelu_quantize(3 * x), gelu(3 * x))


@triton.jit
def _gelu_kernel(x: Any, out: Any, BLOCK: tl.constexpr) -> None:
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + at, _gelu(tl.load(x + at)))


@pytest.mark.skipif("triton" not in IMPLEMENTATIONS, reason="needs Triton's interpreter")
@pytest.mark.filterwarnings("ignore:overflow encountered in multiply:RuntimeWarning")  # of x * x, as meant
def test_gelu_has_five_digits_everywhere() -> None:
    far = torch.logspace(-30, 30, 512)
    x = torch.cat([torch.linspace(-14, 14, 1 << 14), far, -far, torch.zeros(1024)])
    out = torch.full_like(x, torch.nan)
    _gelu_kernel[(len(x) // 1024,)](x, out, BLOCK=1024)
    exact = gelu(x)
    assert bool(((out - exact).abs() <= exact.abs() * 1.2e-5 + 1e-37).all())


@each_implementation
@pytest.mark.usefixtures("use")
def test_rows_of_zeros() -> None:
    x = torch.zeros(2, 20)
    q, scale = fk.gelu_quantize(x)
    assert scale.tolist() == [2.0**-126] * 2
    assert bool((q.float() == 0).all())
    bias = torch.linspace(-1, 1, 20)
    q, scale = fk.layer_norm_quantize(x, torch.ones(20), bias)
    assert_within_bounds(q, scale, bias.double().expand(2, -1))
    q, scale = fk.layer_norm_quantize(x, torch.zeros(20), torch.zeros(20))
    assert scale.tolist() == [2.0**-126] * 2
    assert bool((q.float() == 0).all())


@each_implementation
@pytest.mark.usefixtures("use")
@pytest.mark.filterwarnings("ignore:(invalid value|overflow) encountered:RuntimeWarning")  # numpy's
def test_what_is_not_finite_shows_in_its_row_alone() -> None:
    x = torch.randn(4, 40)
    x[0, 2], x[1, 39], x[2, 8] = torch.nan, torch.inf, -torch.inf
    for q, scale in (
        fk.layer_norm_quantize(x, torch.ones(40), torch.zeros(40)),
        fk.layer_norm_quantize(torch.zeros(4, 40), torch.ones(40), torch.zeros(40), residual=x)[:2],
        fk.gelu_quantize(x),
    ):
        back = q.float() * scale[:, None]
        assert bool(back[:3].isnan().all())
        assert bool(back[3].isfinite().all())


@each_implementation
@pytest.mark.usefixtures("use")
def test_strides_do_not_matter() -> None:
    x = torch.randn(12, 14)[::2, 1:12]  # [6, 11]
    residual = torch.randn(11, 6).t()
    weight, bias = torch.randn(22)[::2], torch.randn(11)
    expected = fk.layer_norm_quantize(
        x.contiguous(), weight.contiguous(), bias, residual=residual.contiguous()
    )
    for one, right in zip(fk.layer_norm_quantize(x, weight, bias, residual=residual), expected, strict=True):
        assert one.is_contiguous()
        assert torch.equal(one.float(), right.float())
    assert_within_bounds(*fk.gelu_quantize(x), gelu(x))  # torch's own differs in the last bit


def test_float64_and_rows_longer_than_registers_hold() -> None:
    for dtype, width in ((torch.float64, 30), (torch.float32, 9_000)):
        x, weight, bias = torch.randn(3, 2, width, dtype=dtype).unbind(1)[0], *torch.randn(2, width).to(dtype)
        q, scale, total = fk.layer_norm_quantize(x, weight, bias, residual=x)
        assert torch.equal(total, 2 * x)
        assert total.dtype == dtype
        exact = F.layer_norm(2 * x.double(), (width,), weight.double(), bias.double(), 1e-6)
        assert_within_bounds(q, scale, exact)
        assert_within_bounds(*fk.gelu_quantize(x), gelu(x))


@each_implementation
@pytest.mark.usefixtures("use")
def test_the_ops_are_registered_as_torch_wants_it() -> None:
    x, weight, bias = torch.randn(3, 8), torch.randn(8), torch.randn(8)
    # test_schema multiplies tensors, which fp8 does not do.
    tests = ("test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    ops, preference = torch.ops.fastjepa, fk.choice.preference()
    for residual in (None, torch.randn(3, 8)):
        arguments = (x, weight, bias, 1e-6, residual, preference)
        torch.library.opcheck(ops.layer_norm_quantize, arguments, test_utils=tests)
    torch.library.opcheck(ops.gelu_quantize, (x, preference), test_utils=tests)
    with FlopCounterMode(display=False) as counter:
        fk.layer_norm_quantize(x, weight, bias)
        fk.gelu_quantize(x)
    assert counter.get_total_flops() == 0


def linear_inputs(tokens: int = 5, columns: int = 24, rows: int = 7) -> tuple[Tensor, ...]:
    """q, scale, weight_q, weight_scale, bias."""
    x, weight = torch.randn(tokens, columns), torch.randn(rows, columns)
    quantised = []
    for each in (x, weight):
        q, scale = torch.empty_like(each, dtype=FP8), torch.empty(len(each))
        fk.quantize_rows_(each, q, scale)
        quantised += [q, scale]
    return *quantised, torch.randn(rows)


@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize(
    ("out_dtype", "tolerance"),
    [(torch.bfloat16, 2**-8), (torch.float16, 2**-11), (torch.float32, 1e-6), (torch.float64, 1e-14)],
)
@pytest.mark.parametrize("shape", [(5, 24, 7), (0, 16, 16), (32, 64, 48)])
def test_a_linear_layer_multiplies_what_was_quantised(
    shape: tuple[int, int, int], out_dtype: torch.dtype, tolerance: float, with_bias: bool
) -> None:
    q, scale, weight_q, weight_scale, bias = linear_inputs(*shape)
    given_bias = bias if with_bias else None
    out = fk.fp8_linear(q, scale, weight_q, weight_scale, given_bias, out_dtype)
    exact = (q.double() * scale.double()[:, None]) @ (weight_q.double() * weight_scale.double()[:, None]).t()
    exact = exact + bias.double() if with_bias else exact
    assert out.dtype == out_dtype
    size = (q.double() * scale.double()[:, None]).abs() @ (
        weight_q.double() * weight_scale[:, None]
    ).abs().t()
    assert bool(((out.double() - exact).abs() <= tolerance * (exact.abs() + size)).all())


def test_a_linear_layer_is_registered_and_its_product_counted_once() -> None:
    q, scale, weight_q, weight_scale, bias = linear_inputs(32, 64, 48)
    for given_bias in (bias, None):
        torch.library.opcheck(
            torch.ops.fastjepa.fp8_linear,
            (q, scale, weight_q, weight_scale, given_bias, torch.bfloat16),
            test_utils=("test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"),
        )
    with FlopCounterMode(display=False) as counter:
        fk.fp8_linear(q, scale, weight_q, weight_scale, bias)
    assert counter.get_total_flops() == 2 * 32 * 64 * 48


def test_what_a_device_without_fp8_is_told() -> None:
    assert not fk.fp8_available("cpu")
    assert not fk.fp8_available(torch.device("meta"))


def test_they_compile_without_a_break() -> None:
    weight_q, weight_scale, bias = linear_inputs(1, 16, 16)[2:]
    weight = torch.randn(16)

    def layer(x: Tensor, branch: Tensor) -> tuple[Tensor, Tensor]:
        q, scale, x = fk.layer_norm_quantize(x, weight, weight, residual=branch)
        q, scale = fk.gelu_quantize(fk.fp8_linear(q, scale, weight_q, weight_scale, bias))
        return x, fk.fp8_linear(q, scale, weight_q, weight_scale, bias)

    x, branch = torch.randn(2, 5, 16)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for one, right in zip(compiled(x, branch), layer(x, branch), strict=True):
        assert torch.equal(one, right)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"x": torch.ones(4)}, r"x must be \[T, D\], got \[4\]"),
        ({"x": torch.ones(2, 4).long()}, "x must be floating point"),
        ({"x": torch.ones(2, 0)}, r"x must be \[T, D\], got \[2, 0\]"),
        ({"weight": torch.ones(3)}, r"weight must be \[D\] = \[4\], got \[3\]"),
        ({"bias": torch.ones(4).int()}, "bias must be floating point"),
        ({"residual": torch.ones(2, 3)}, r"residual must be like x, \[2, 4\] float32 on cpu, got \[2, 3\]"),
        ({"residual": torch.ones(2, 4).half()}, "residual must be like x, .* got .* float16"),
        ({"bias": torch.ones(4, device="meta")}, "one device"),
    ],
)
def test_wrong_arguments_of_layer_norm_are_named(arguments: dict[str, Any], message: str) -> None:
    given = {"x": torch.ones(2, 4), "weight": torch.ones(4), "bias": torch.ones(4), **arguments}
    with pytest.raises(ValueError, match=message):
        fk.layer_norm_quantize(**given)


def test_wrong_arguments_of_gelu_are_named() -> None:
    with pytest.raises(ValueError, match=r"x must be \[T, K\], got \[3\]"):
        fk.gelu_quantize(torch.ones(3))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"q": torch.ones(5, 24)}, r"q must be \[T, K\] in float8_e4m3fn, got \[5, 24\] float32"),
        ({"weight_q": torch.ones(7, 20).to(FP8)}, r"agree in K, got \[5, 24\] .* and \[7, 20\]"),
        ({"scale": torch.ones(4)}, r"scale must be \[T\] = \[5\] in float32, got \[4\]"),
        ({"weight_scale": torch.ones(7).half()}, r"weight_scale must be \[N\] = \[7\] .* float16"),
        ({"bias": torch.ones(8)}, r"bias must be \[N\] = \[7\], got \[8\]"),
        ({"out_dtype": torch.int32}, "out_dtype must be floating point"),
        ({"scale": torch.ones(5, device="meta")}, "one device"),
    ],
)
def test_wrong_arguments_of_a_linear_layer_are_named(arguments: dict[str, Any], message: str) -> None:
    names = ("q", "scale", "weight_q", "weight_scale", "bias")
    given = {**dict(zip(names, linear_inputs(), strict=True)), **arguments}
    with pytest.raises(ValueError, match=message):
        fk.fp8_linear(**given)
