"""The target encoder in fp8 on the device: as exact as its numbers allow, without waiting, in a graph."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

import fastjepa_kernels as fk
from fastjepa.models import VisionTransformer, ViTShape
from fastjepa.models.fp8 import Fp8Encoder

FP8 = torch.float8_e4m3fn
SHAPE = ViTShape(image_size=(64, 96), patch_size=16, width=384, depth=4, heads=6)
PATCHES = 24
# Of the layer-normed target. Of the same numbers, multiplied out on the CPU, 0.064 of what the blocks add.
TOLERANCE = 0.1
# Hopper's fast accumulation cuts a partial sum to about 14 bits, hundreds of times for the longest rows.
GEMM_TOLERANCE = 2**-6
SAME = 0.005  # another number of rows, or a graph, may get another kernel, which sums in another order


@pytest.fixture(autouse=True)
def has_fp8() -> None:
    if not fk.fp8_available("cuda"):
        pytest.skip("no fp8 on this device")


@contextmanager
def no_waiting() -> Iterator[None]:
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def encoder(shape: ViTShape = SHAPE) -> VisionTransformer:
    torch.manual_seed(0)
    model = VisionTransformer(shape)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) / 25)
    return model.to("cuda", torch.bfloat16).requires_grad_(False)


def images(batch: int, shape: ViTShape = SHAPE) -> Tensor:
    return torch.randint(256, (batch, 3, *shape.image_size), dtype=torch.uint8, device="cuda")


def error(out: Tensor, exact: Tensor) -> float:
    return float((out.double() - exact.double()).norm() / exact.double().norm())


def quantised(x: Tensor) -> tuple[Tensor, Tensor]:
    q, scale = torch.empty_like(x, dtype=FP8), torch.empty(len(x), device=x.device)
    fk.quantize_rows_(x, q, scale)
    return q, scale


@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("tokens", [1, 17, 196, 1568])
@pytest.mark.parametrize(
    ("out_features", "in_features"), [(2304, 768), (768, 3072), (1280, 5120), (6144, 1408), (48, 16)]
)
def test_fp8_linear_is_the_product_of_what_was_quantised(
    out_features: int, in_features: int, tokens: int, with_bias: bool
) -> None:
    x = (
        torch.randn(tokens, in_features, device="cuda")
        * torch.logspace(-3, 3, tokens, device="cuda")[:, None]
    )
    weight = torch.randn(out_features, in_features, device="cuda") / in_features**0.5
    weight *= torch.logspace(-1, 1, out_features, device="cuda")[:, None]
    bias = torch.randn(out_features, device="cuda", dtype=torch.bfloat16) if with_bias else None
    (q, scale), (weight_q, weight_scale) = quantised(x), quantised(weight)
    with no_waiting():
        out = fk.fp8_linear(q, scale, weight_q, weight_scale, bias)
    exact = (q.double() * scale.double()[:, None]) @ (weight_q.double() * weight_scale.double()[:, None]).t()
    exact = exact if bias is None else exact + bias.double()
    assert out.dtype == torch.bfloat16
    row_errors = (out.double() - exact).norm(dim=1) / exact.norm(dim=1)
    assert float(row_errors.max()) < GEMM_TOLERANCE


def test_a_bias_may_begin_anywhere() -> None:
    q, scale = quantised(torch.randn(32, 64, device="cuda"))
    weight_q, weight_scale = quantised(torch.randn(48, 64, device="cuda"))
    buffer = torch.randn(49, device="cuda", dtype=torch.bfloat16)
    out = fk.fp8_linear(q, scale, weight_q, weight_scale, buffer[1:])
    assert torch.equal(out, fk.fp8_linear(q, scale, weight_q, weight_scale, buffer[1:].clone()))


@pytest.mark.parametrize("width", [384, 768, 1024, 1280, 1408])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_kernels_give_what_torch_gives(width: int, dtype: torch.dtype) -> None:
    x, residual = (torch.randn(501, width, device="cuda").to(dtype) for _ in range(2))
    weight, bias = 1 + torch.randn(2, width, device="cuda").to(dtype) / 4
    hidden = 3 * torch.randn(501, 4 * width, device="cuda").to(dtype)

    def results() -> list[Tensor]:
        return [
            *fk.layer_norm_quantize(x, weight, bias),
            *fk.layer_norm_quantize(x, weight, bias, residual=residual),
            *fk.gelu_quantize(hidden),
            *quantised(hidden),
        ]

    with fk.use("torch", strict=True):
        expected = results()
    with fk.use("triton", strict=True):
        got = results()
    for one, right in zip(got, expected, strict=True):
        assert one.dtype == right.dtype
        if one.dtype == FP8:  # what lies between two codes may fall to either side
            differ = one.float() != right.float()
            assert float(differ.float().mean()) < 5e-3  # 1.7e-3 was seen on an H100
            assert bool(((one.float() - right.float()).abs() <= right.float().abs() / 7 + 2**-9).all())
        elif one.dtype == torch.float32 and one.ndim == 1:
            torch.testing.assert_close(one, right, rtol=1e-5, atol=0)
        else:
            assert torch.equal(one, right)


def test_what_is_not_finite_is_nan() -> None:
    x = torch.randn(4, 768, device="cuda", dtype=torch.bfloat16)
    x[0, 3], x[1, 700], x[2, 5] = torch.nan, torch.inf, -torch.inf
    ones, zeros = torch.ones(768, device="cuda"), torch.zeros(768, device="cuda")
    with fk.use("triton", strict=True):
        for q, scale in (quantised(x), fk.gelu_quantize(x), fk.layer_norm_quantize(x, ones, zeros)):
            back = q.float() * scale[:, None]
            assert bool(back[:2].isnan().all())
            assert bool(back[2].isnan().any())
            assert bool(back[3].isfinite().all())


def layer_normed(model: VisionTransformer, hidden: Tensor) -> Tensor:
    return torch.nn.functional.layer_norm(model.norm(hidden).float(), hidden.shape[-1:])


@pytest.mark.parametrize("class_token", [False, True])
def test_it_is_near_the_encoder_in_bf16(class_token: bool) -> None:
    shape = ViTShape(**{**SHAPE.__dict__, "class_token": class_token})
    model, batch = encoder(shape), images(7)
    expected = model(batch, final_norm=False)
    hidden = Fp8Encoder(model).hidden(batch)
    assert hidden.shape == expected.shape
    assert hidden.dtype == torch.bfloat16
    assert error(layer_normed(model, hidden), layer_normed(model, expected)) < TOLERANCE


def test_at_some_rows_it_is_the_slice() -> None:
    model, batch = Fp8Encoder(encoder()), images(3)
    rows = torch.randint(3 * PATCHES, (29,), device="cuda")
    assert error(model.hidden(batch, rows), model.hidden(batch).flatten(0, 1)[rows]) < SAME


@pytest.mark.parametrize("some", [False, True])
def test_it_waits_for_nothing_and_a_captured_graph_computes_on_new_data(some: bool) -> None:
    source = encoder()
    model, batch = Fp8Encoder(source), images(5)
    rows = torch.randint(5 * PATCHES, (31,), device="cuda") if some else None
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        model.hidden(batch, rows)
    torch.cuda.current_stream().wait_stream(stream)
    with no_waiting():
        model.hidden(batch, rows)
        model.refresh()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        captured = model.hidden(batch, rows)
    for _ in range(2):
        batch.copy_(images(5))
        if rows is not None:
            rows.copy_(torch.randint_like(rows, 5 * PATCHES))
        for parameter in source.parameters():
            parameter.mul_(0.97)
        model.refresh()
        expected = model.hidden(batch, rows)
        captured.fill_(torch.nan)
        graph.replay()
        assert error(captured, expected) < SAME


def test_refreshing_allocates_nothing() -> None:
    model = Fp8Encoder(encoder())
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    with no_waiting():
        model.refresh()
    assert torch.cuda.max_memory_allocated() == before
