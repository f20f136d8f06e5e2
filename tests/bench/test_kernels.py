"""The ways that the ops are compared with: they compute the same, and move the bytes that are said."""

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fastjepa_kernels as fk
from bench.kernels import (
    bench_adamw,
    bench_attention,
    bench_ema,
    bench_gather,
    bench_loss,
    bench_masks,
    bench_patchify,
    published,
    stock,
)
from bench.kernels.case import DEFAULT, Case, Phase, Random, Way, arrange, gradient_of, ours
from bench.kernels.check import check, error
from fastjepa.masks import Masks, MultiBlockMasks
from fastjepa.models import VisionTransformer, ViTShape

OPS = (bench_gather, bench_patchify, bench_attention, bench_loss, bench_ema, bench_adamw)
SMALL = [case for op in OPS for case in op.cases("small", torch.float32)]


@pytest.fixture
def random() -> Random:
    return Random.on(torch.device("cpu"))


def uninterpreted(case: Case) -> Case:
    """Without Triton's interpreter, which the tests of the ops run."""
    ways = case.ways
    return replace(case, ways=lambda device: [way for way in ways(device) if "triton" not in way.name])


@pytest.mark.parametrize("case", SMALL, ids=str)
def test_every_way_computes_the_same(case: Case, random: Random) -> None:
    case = uninterpreted(case)
    verdicts = check(case, random)
    assert verdicts.red == {}
    assert verdicts.cannot == {}
    kinds = {way.kind for way in case.ways("cpu") if way.name in verdicts.right}
    assert {"fastjepa", "implementation", "stock"} <= kinds
    assert "published" in kinds or case.name.startswith("L 1 to"), "only unequal lengths were never published"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("op", OPS)
def test_they_do_in_half_precision_too(op: Any, dtype: torch.dtype, random: Random) -> None:
    for case in op.cases("small", dtype):
        verdicts = check(uninterpreted(case), random)
        assert (verdicts.red, verdicts.cannot) == ({}, {})


def test_every_scale_has_cases_of_each_op() -> None:
    for op in OPS:
        for scale in ("small", "cpu", "gpu"):
            cases = op.cases(scale, torch.bfloat16)
            assert len({str(case) for case in cases}) == len(cases) > 0


def test_the_published_gather_is_row_by_row(random: Random) -> None:
    x, index = random.normal(3, 7, 5, dtype=torch.float32), random.below(7, 3, 4)
    expected = torch.stack([x[b, index[b]] for b in range(3)])
    assert torch.equal(published.apply_masks(x, [index, index]), torch.cat([expected, expected]))


def test_the_published_loss_is_its_formula(random: Random) -> None:
    prediction, hidden = (random.normal(*shape, dtype=torch.float64) for shape in ((2, 3, 2, 6), (3, 5, 6)))
    index, weight, bias = random.below(5, 2, 3, 2), torch.rand(6).double(), torch.rand(6).double()
    target = torch.stack([torch.stack([hidden[b, index[m, b]] for b in range(3)]) for m in range(2)])

    def normed(x: Tensor, eps: float) -> Tensor:
        return (x - x.mean(-1, keepdim=True)) / (x.var(-1, correction=0, keepdim=True) + eps).sqrt()

    off = (prediction - normed(normed(target, 1e-6) * weight + bias, 1e-5)).abs()
    expected = torch.where(off < 1, off**2 / 2, off - 0.5).mean()
    torch.testing.assert_close(published.loss(prediction, hidden, index, weight, bias), expected)


def test_the_published_patches_are_a_convolution_s(random: Random) -> None:
    images = random.below(256, 2, 3, 12, 8, dtype=torch.uint8)
    mean, std = torch.rand(3), torch.rand(3) + 0.1
    filters = random.normal(6, 3, 4, 4, dtype=torch.float32)
    pixels = (images / 255 - mean[:, None, None]) / std[:, None, None]
    expected = F.conv2d(pixels, filters, stride=4).flatten(2).transpose(1, 2)
    patches = published.patchify(images, None, mean, std, 4, torch.float32)
    torch.testing.assert_close(patches @ filters.flatten(1).t(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("lengths", [(4, 4, 4), (5, 1, 3)])
def test_attention_stays_within_each_sequence(lengths: tuple[int, ...], random: Random) -> None:
    qkv = random.normal(sum(lengths), 3, 2, 8, dtype=torch.float64)
    ends = torch.tensor([0, *lengths]).cumsum(0).tolist()
    parts = []
    for start, end in pairwise(ends):
        query, key, value = qkv[start:end].permute(1, 2, 0, 3)
        parts.append((torch.softmax(query @ key.mT / 8**0.5, -1) @ value).transpose(0, 1))
    for attend in (published.attention, stock.attention):
        torch.testing.assert_close(attend(qkv, lengths), torch.cat(parts))


def test_the_published_average_is_the_formula() -> None:
    shadow, source = torch.rand(5).double(), torch.rand(5).double()
    expected = 0.9 * shadow + 0.1 * source
    published.ema([shadow], [source], 0.9)
    torch.testing.assert_close(shadow, expected)


def test_the_shapes_of_a_vit_are_those_of_its_model() -> None:
    model = VisionTransformer(ViTShape((224, 224), patch_size=16, width=768, depth=12, heads=12))
    shapes = sorted(tuple(parameter.shape) for parameter in model.parameters() if parameter.requires_grad)
    assert sorted(bench_ema.vit_shapes(768, 12)) == shapes


def test_the_published_sampler_draws_masks_as_published() -> None:
    # 81.7 ± 13.5 tokens of context before the cut, so 200 of them have a mean within 5 of .95.
    lengths = [published.sample_masks(1, 14)[0].shape[1] for _ in range(200)]
    assert abs(sum(lengths) / len(lengths) - 81.7) < 5 * 13.5 / len(lengths) ** 0.5
    context, targets = published.sample_masks(8, 14)
    assert bench_masks.problems(Masks(context, targets)) == ""


def test_masks_that_are_none_are_seen() -> None:
    masks = MultiBlockMasks((14, 14), "truncate").sample(torch.arange(8))
    assert bench_masks.problems(masks) == ""
    assert "ascend" in bench_masks.problems(Masks(masks.context.flip(1), masks.targets))
    assert "last row" in bench_masks.problems(Masks(masks.context + 195 - masks.context.max(), masks.targets))
    assert "shapes" in bench_masks.problems(Masks(masks.context, masks.targets[:2]))


def test_bytes_that_must_move() -> None:
    half, single = torch.bfloat16, torch.float32
    # 50 rows of 1024 values of 128 images, read and written, and an index of 8 bytes.
    assert bench_gather.case("", 128, 196, 50, 1024, half).bytes_moved == {
        "forward": 2 * 128 * 50 * 1024 * 2 + 128 * 50 * 8,
        "backward": 128 * (50 + 196) * 1024 * 2 + 128 * 50 * 8,
        "forward+backward": 128 * (100 + 50 + 196) * 1024 * 2 + 2 * 128 * 50 * 8,
    }
    assert bench_gather.case("", 2, 6, 3, 8, single, with_pos=True).bytes_moved["forward"] == 2 * (
        2 * 3 * 8 * 4 + 3 * 8
    ) + (6 * 8 * 4)
    # One byte in, two out, for every kept pixel.
    assert bench_patchify.case("", 2, 224, 16, None, half).bytes_moved["forward"] == 2 * 3 * 224**2 * 3
    assert bench_attention.case("", (3, 5), 2, 24, half).bytes_moved == {
        "forward": 4 * 8 * 2 * 24 * 2,
        "backward": 7 * 8 * 2 * 24 * 2,
        "forward+backward": 11 * 8 * 2 * 24 * 2,
    }
    # Six per element in bf16, as the op says, and the index.
    loss = bench_loss.case("", 4, 2, 9, 5, 16, half).bytes_moved["forward+backward"]
    assert loss == 6 * 4 * 2 * 5 * 16 + 8 * 4 * 2 * 5
    # Per parameter, 12, and 14 with a bf16 copy.
    assert bench_ema.case("", [(10, 10), (3,)], single).bytes_moved["forward"] == 12 * 103
    assert bench_ema.case("", [(103,)], single, half).bytes_moved["forward"] == 14 * 103


@pytest.mark.parametrize("phase", ["forward", "backward", "forward+backward"])
def test_phases_run_what_they_say(phase: Phase, random: Random) -> None:
    calls = []

    class Square(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
            ctx.save_for_backward(x)
            calls.append("forward")
            return x**2

        @staticmethod
        def backward(ctx, gradient: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
            calls.append("backward")
            return 2 * ctx.saved_tensors[0] * gradient

    case = squares(Square.apply, [], with_gradient=(0,))
    inputs = case.make(random)
    run = arrange(case, Square.apply, phase, inputs, torch.full((3,), 5.0))
    calls.clear()
    out = run()
    assert "+".join(calls) == phase
    if phase != "forward":
        torch.testing.assert_close(out[-1], 10 * inputs[0])


def squares(call: Callable[[Tensor], Any], extra: list[Way], with_gradient: tuple[int, ...] = ()) -> Case:
    """x ** 2 by `call`, which stands for an op of ours, and `extra` ways."""
    return Case(
        op="square",
        name="three",
        dtype=torch.float32,
        make=lambda random: (random.normal(3, dtype=torch.float32),),
        ways=lambda device: [Way(DEFAULT, "fastjepa", call), Way("stock", "stock", torch.square), *extra],
        exact=torch.square,
        bytes_moved={"forward": 24},
        with_gradient=with_gradient,
    )


def broken(x: Tensor) -> Tensor:
    raise RuntimeError("it cannot\nand says why")


@pytest.mark.parametrize(
    ("call", "why"),
    [
        (lambda x: x**2 + 1e-6, "error"),
        (lambda x: torch.cat([x[:2] ** 2, torch.empty(1)]), "error inf"),  # which is NaN, being poisoned
        (lambda x: (x**2)[:2], "shapes"),
        (broken, "RuntimeError: it cannot"),
    ],
)
def test_a_wrong_result_is_red(call: Callable[[Tensor], Any], why: str, random: Random) -> None:
    verdicts = check(squares(call, []), random)
    assert why in verdicts.red[DEFAULT]
    assert not verdicts.ours_are_right
    assert verdicts.right == ["stock"]


def test_others_may_be_less_exact_or_unable_but_not_wrong(random: Random) -> None:
    extra = [
        Way("rough", "peer", lambda x: x**2 * (1 + 1e-7)),
        Way("unable", "peer", broken),
        Way("wrong", "published", lambda x: x**3),
        Way("slow", "peer", torch.square, starts_slowly=True),
    ]
    verdicts = check(squares(torch.square, extra), random, in_time=lambda: False)
    assert verdicts.right == [DEFAULT, "stock", "rough"]
    assert list(verdicts.cannot) == ["unable", "slow"]
    assert list(verdicts.red) == ["wrong"]
    assert verdicts.ours_are_right


def test_an_implementation_that_does_not_take_a_case_is_left_out(random: Random) -> None:
    def refuse(x: Tensor) -> Tensor:
        raise ValueError("square cannot run as 'cpp' with these arguments")

    verdicts = check(squares(torch.square, [Way(f"{DEFAULT}:cpp", "implementation", refuse)]), random)
    assert f"{DEFAULT}:cpp" not in [*verdicts.right, *verdicts.red, *verdicts.cannot]


def test_the_implementation_asked_for_is_the_one_that_runs(random: Random) -> None:
    case = bench_gather.cases("small", torch.float32)[0]
    with fk.use("torch"):
        names = [way.name for way in ours("gather_tokens", fk.gather_tokens, "cpu")]
    assert names == [DEFAULT, *[f"{DEFAULT}:{name}" for name in fk.implementations("gather_tokens", "cpu")]]
    inputs = case.make(random)
    preferred = []
    for way in ours("gather_tokens", lambda *_: preferred.append(fk.choice.preference()), "cpu"):
        way.call(*inputs)
    assert preferred == ["", *[f"{name}!" for name in fk.implementations("gather_tokens", "cpu")]]


def test_error_is_relative_and_knows_nan() -> None:
    exact = torch.tensor([3.0, 4.0])
    assert error(exact + torch.tensor([0.0, 0.5]), exact) == pytest.approx(0.1)
    assert error(torch.tensor([3.0, torch.nan]), exact) == float("inf")
    assert error(torch.zeros(2), torch.zeros(2)) == 0


def test_the_gradient_of_a_number_is_not_one(random: Random) -> None:
    case = bench_loss.cases("small", torch.float32)[0]
    gradient = gradient_of(case, case.make(random), random)
    assert gradient is not None
    assert gradient.shape == ()
    assert float(gradient) != 1
    assert gradient_of(bench_patchify.cases("small", torch.float32)[0], (), random) is None
