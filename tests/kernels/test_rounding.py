from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import fastjepa_kernels as fk
from fastjepa_kernels.language import tl, triton
from fastjepa_kernels.philox import philox
from fastjepa_kernels.rounding import random_bits, round_to_bfloat16, to_bfloat16_bits

WAYS = [name for name in fk.implementations("ema_update_", "cpu") if name in ("triton", "torch")]


def bits_of(value: Tensor) -> Tensor:
    return value.view(torch.int16 if value.dtype == torch.bfloat16 else torch.int32)


def rounded_by_integers(value: float, word: int) -> int:
    """The bits of bf16 from fp32 and a random word, in Python's integers."""
    bits = int(bits_of(torch.tensor(value))) % 2**32
    sign, magnitude = bits & 0x8000_0000, bits & 0x7FFF_FFFF
    if magnitude > 0x7F80_0000:  # NaN
        magnitude |= 0x40_0000
    elif magnitude < 0x7F80_0000:
        magnitude = min(magnitude + (word >> 16), 0x7F7F_FFFF)
    return (sign | magnitude) >> 16


@settings(deadline=None, max_examples=30)
@given(
    st.lists(st.floats(width=32), min_size=1, max_size=9),
    st.integers(-(2**70), 2**70),
    st.integers(0, 2**32 - 1),
    st.integers(0, 2**32 - 1),
    st.integers(0, 2**40),
)
def test_each_element_has_its_own_word(
    values: list[float], seed: int, step: int, parameter: int, offset: int
) -> None:
    value = torch.tensor(values)
    out = round_to_bfloat16(value, fk.StochasticRounding(seed, step), parameter, offset)
    key = seed % 2**32, (seed >> 32) % 2**32
    for i, found in enumerate(bits_of(out).tolist()):
        group, word = divmod(offset + i, 4)
        counter = [torch.tensor(each) for each in (group % 2**32, group >> 32, parameter, step)]
        words = philox((counter[0], counter[1], counter[2], counter[3]), key)
        assert found % 2**16 == rounded_by_integers(value[i].item(), int(words[word]))


def test_the_mean_is_what_was_rounded() -> None:
    # A quarter of the way from 1 to the next number of bf16, and from -3 to the next.
    value = torch.tensor([1 + 2**-9, -3 - 2**-8]).repeat_interleave(200_000)
    out = round_to_bfloat16(value, fk.StochasticRounding(0, 1)).float().view(2, -1)
    assert set(out[0].tolist()) == {1, 1 + 2**-7}
    assert set(out[1].tolist()) == {-3, -3 - 2**-6}
    up = (out != out.new_tensor([[1], [-3]])).double().mean(dim=1)
    # Of n draws, the share has a standard deviation of sqrt(3 / 16 / n).
    assert bool((abs(up - 0.25) < 5 * (3 / 16 / 200_000) ** 0.5).all())


def test_what_bf16_holds_stays_and_finite_stays_finite() -> None:
    held = torch.randn(1000).bfloat16()
    special = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, 2.0**-133, 1.0]).bfloat16()
    rounding = fk.StochasticRounding(3, 4)
    for exact in (held, special):
        assert torch.equal(bits_of(round_to_bfloat16(exact.float(), rounding)), bits_of(exact))
    nans = torch.tensor([0x7F80_0001, 0x7FFF_FFFF, -1, -0x7F_FFFF], dtype=torch.int32).view(torch.float32)
    assert bool(nans.isnan().all())
    assert bool(round_to_bfloat16(nans, rounding).isnan().all())
    largest = torch.finfo(torch.float32).max
    out = round_to_bfloat16(torch.tensor([largest, -largest]).repeat(100), rounding)
    assert set(out.abs().tolist()) == {torch.finfo(torch.bfloat16).max}


def test_long_tensors_are_rounded_in_pieces_of_one_stream() -> None:
    value = torch.randn(2**20 + 5)
    rounding = fk.StochasticRounding(8, 1)
    whole = round_to_bfloat16(value, rounding, parameter=2, offset=1)
    end = round_to_bfloat16(value[-9:], rounding, parameter=2, offset=1 + len(value) - 9)
    assert torch.equal(whole[-9:], end)
    assert whole.shape == value.shape
    assert round_to_bfloat16(torch.empty(0, 3), rounding, offset=5).shape == (0, 3)


@triton.jit
def _rounding_kernel(value: Any, out: Any, noise: Any, seed: Any, place: Any, BLOCK: tl.constexpr) -> None:
    inside = tl.arange(0, BLOCK)
    bits = random_bits(seed, tl.load(place), tl.load(place + 1), tl.load(place + 2), BLOCK)
    tl.store(noise + inside, bits)
    tl.store(out + inside, to_bfloat16_bits(tl.load(value + inside), bits))


@pytest.mark.skipif("triton" not in WAYS, reason="needs Triton's interpreter")
@pytest.mark.parametrize("seed", [0, 5, -1, 2**40 + 3, -(2**63)])
def test_triton_draws_the_same_bits(seed: int) -> None:
    special = [torch.inf, -torch.inf, torch.nan, 0.0, -0.0, 3.4e38, -3.4e38, 1e-40]
    value = torch.cat([torch.randn(56) * 10, torch.tensor(special)])
    for step, parameter, first in ((0, 0, 0), (2**32 - 1, 2**31, 12), (1, 7, 2**36 - 4 * 8)):
        out, noise = torch.full((64,), -1, dtype=torch.int16), torch.full((64,), -1, dtype=torch.int32)
        place = torch.tensor([step, parameter, first])
        _rounding_kernel[(1,)](value, out, noise, seed, place, BLOCK=64)
        expected = round_to_bfloat16(value, fk.StochasticRounding(seed, step), parameter, first)
        assert torch.equal(out, bits_of(expected))
        assert 0 <= int(noise.min()) <= int(noise.max()) < 2**16


def flat_average(implementation: str, cuts: list[int], step: int | Tensor, working: bool) -> list[Tensor]:
    """A parameter of 5,003 elements, and one of 70, averaged in these pieces; with copies if asked."""
    random = torch.Generator().manual_seed(1)
    shadow = torch.randn(5073, generator=random).bfloat16()
    source = torch.randn(5073, generator=random)
    copy = torch.full((5073,), torch.nan, dtype=torch.float16)
    edges = sorted({0, 5003, 5073, *cuts})
    sizes = [end - start for start, end in pairwise(edges)]
    numbers = [int(start >= 5003) for start in edges[:-1]]
    rounding = fk.StochasticRounding(
        11, step, [9 - 2 * number for number in numbers],
        [start - 5003 * number for start, number in zip(edges, numbers, strict=False)],
    )  # fmt: skip
    with fk.use(implementation, strict=True):
        fk.ema_update_(
            list(shadow.split(sizes)), list(source.split(sizes)), 0.9,
            list(copy.split(sizes)) if working else None, rounding=rounding,
        )  # fmt: skip
    return [shadow, copy] if working else [shadow]


@pytest.mark.parametrize("implementation", WAYS)
@pytest.mark.parametrize("working", [False, True])
def test_neither_shards_nor_implementation_change_the_average(implementation: str, working: bool) -> None:
    whole = flat_average("torch", [], 3, working)
    for cuts in ([], [4096], [1, 2, 3, 1030, 5001], [2047, 4999, 5006]):
        for step in (3, torch.tensor(3)):
            pieces = flat_average(implementation, cuts, step, working)
            # A product rounded before it is added, under the interpreter, is at most one ulp of fp32 away.
            assert sum(int((a != b).sum()) for a, b in zip(pieces, whole, strict=True)) <= 2
    assert not torch.equal(whole[0], flat_average(implementation, [], 4, working)[0])
    if working:
        assert torch.equal(whole[1], whole[0].half())


def test_an_average_in_bf16_moves_as_one_in_fp32_does() -> None:
    # A thousandth of the way at a time, each step an eighth of what bf16 resolves, or less.
    steps, momentum = 60, 0.99
    shadow, exact = torch.ones(4000, dtype=torch.bfloat16), torch.ones(4000)
    source = torch.full((4000,), 1.0625)
    for step in range(steps):
        fk.ema_update_(shadow, source, momentum, rounding=fk.StochasticRounding(0, step))
        fk.ema_update_(exact, source, momentum)
    assert 1.02 < exact[0] < 1.04
    # One rounding is off by less than 2**-7, 2**-8 on average; rounding errors decay as the average does.
    assert abs(float(shadow.float().mean() - exact.mean())) < 5 * 2**-8 * (steps / 4000) ** 0.5


def test_strided_averages_go_by_their_elements() -> None:
    start = torch.randn(6, 10).bfloat16()
    source = torch.randn(6, 10)
    rounding = fk.StochasticRounding(1, 2, parameters=[5])
    expected = start.clone()
    fk.ema_update_([expected], [source], 0.9, rounding=rounding)
    for implementation in WAYS:
        shadow = start.t().contiguous().t()
        assert not shadow.is_contiguous()
        with fk.use(implementation, strict=True):
            fk.ema_update_([shadow], [source.t().contiguous().t()], 0.9, rounding=rounding)
        assert torch.equal(shadow, expected)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"step": -1}, r"rounding.step must lie in 0..4294967295, got -1"),
        ({"step": 2**32}, r"rounding.step must lie in 0..4294967295"),
        ({"step": torch.tensor([1])}, "rounding.step must be an integer, or 0-d int64"),
        ({"step": torch.tensor(1.0)}, "rounding.step must be an integer, or 0-d int64"),
        ({"step": torch.tensor(1, device="meta")}, "rounding.step must be an integer, or 0-d int64"),
        ({"parameters": [1]}, "rounding.parameters has 1 entries, shadow has 2"),
        ({"parameters": [1, -1]}, r"rounding.parameters\[1\] must lie in 0..4294967295, got -1"),
        ({"offsets": [0, 1, 2]}, "rounding.offsets has 3 entries"),
        ({"offsets": [0, -4]}, r"rounding.offsets\[1\] must lie in 0"),
    ],
)
def test_wrong_arguments_are_named(arguments: dict[str, Any], message: str) -> None:
    shadow = [torch.zeros(3).bfloat16(), torch.zeros(2).bfloat16()]
    rounding = fk.StochasticRounding(**{"seed": 0, "step": 0, **arguments})
    with pytest.raises(ValueError, match=message):
        fk.ema_update_(shadow, [torch.ones(3), torch.ones(2)], 0.5, rounding=rounding)
    assert not any(tensor.any() for tensor in shadow)


def test_it_is_for_averages_in_bf16_alone() -> None:
    with pytest.raises(ValueError, match=r"for averages in bf16, got shadow\[0\] = \[3\] float32"):
        fk.ema_update_(torch.zeros(3), torch.ones(3), 0.5, rounding=fk.StochasticRounding(0, 0))
