from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import fastjepa_kernels as fk
from fastjepa_kernels import adamw
from fastjepa_kernels.adamw import HYPER

IMPLEMENTATIONS = fk.implementations("adamw_ema_", "cpu")
each_implementation = pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
ULP = 2**-23
ALWAYS = ("master", "grad", "exp_avg", "exp_avg_sq")
BETAS, EPS = (0.9, 0.999), 1e-8


@pytest.fixture
def use(implementation: str) -> Iterator[str]:
    with fk.use(implementation, strict=True):
        yield implementation


@dataclass(frozen=True)
class Flat:
    """A flat group in the middle of training."""

    master: Tensor
    grad: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    weight: Tensor
    shadow: Tensor
    working: Tensor

    def clone(self) -> "Flat":
        return Flat(*(tensor.clone() for tensor in vars(self).values()))

    def update(self, hyper: Tensor, **options: Any) -> None:
        named = {name: tensor for name, tensor in vars(self).items() if name not in options}
        master, grad, exp_avg, exp_avg_sq = (named.pop(name) for name in ALWAYS)
        fk.adamw_ema_(master, grad, exp_avg, exp_avg_sq, hyper, **named | options)


def some(n: int, dtype: torch.dtype = torch.float32, copy: torch.dtype = torch.float16) -> Flat:
    """Copies are NaN, because they are only written."""
    nan = torch.full((n,), torch.nan, dtype=copy)
    return Flat(
        torch.randn(n), torch.randn(n).to(dtype), torch.randn(n) * 0.1, torch.rand(n) * 0.01, nan,
        torch.randn(n), nan.clone(),
    )  # fmt: skip


def hyper(
    lr: float = 1e-3, decay: float = 0.04, momentum: float = 0.996, step: int = 1, skip: float = 0,
    scale: float = 1,
) -> Tensor:  # fmt: skip
    return torch.tensor([lr, decay, momentum, step, skip, scale], dtype=torch.float64)


def near(out: Tensor, expected: Tensor, ulp: float) -> None:
    torch.testing.assert_close(out, expected, rtol=ulp * ULP, atol=ulp * ULP * float(expected.abs().max()))


@each_implementation
@pytest.mark.parametrize("torchs", ["foreach", "fused"])
@pytest.mark.parametrize("decayed", [True, False])
def test_it_steps_as_torch_does(use: str, torchs: str, decayed: bool) -> None:
    """Measured after 40 steps: to the bit of fused, which torch's way calls; within 1 ulp of foreach, which
    decays by a product; Triton, which fuses multiply-adds, within 2 ulp of the largest weight."""
    start = some(1000)
    group = replace(start, exp_avg=torch.zeros(1000), exp_avg_sq=torch.zeros(1000))
    shadow = group.shadow.clone()
    parameter = torch.nn.Parameter(start.master.clone())
    optimizer = torch.optim.AdamW([parameter], betas=BETAS, eps=EPS, **{torchs: True})
    for step in range(1, 41):
        rates = {"lr": 1e-3 * step / 40, "weight_decay": 0.04 + 0.01 * step}
        optimizer.param_groups[0].update(rates | {"weight_decay": rates["weight_decay"] * decayed})
        group.grad.normal_()
        parameter.grad = group.grad.clone()
        optimizer.step()
        given = hyper(rates["lr"], rates["weight_decay"], step=step)
        group.update(given, decayed=decayed)
        shadow.lerp_(group.master, 1 - 0.996)
        state = optimizer.state[parameter]
        ulp = 2 if use != "torch" else 0 if torchs == "fused" else 1
        near(group.master, parameter.detach(), ulp)
        near(group.exp_avg, state["exp_avg"], 2 * ulp)
        near(group.exp_avg_sq, state["exp_avg_sq"], 2 * ulp)
        near(group.shadow, shadow, ulp)
        assert torch.equal(group.weight, group.master.half())
        assert torch.equal(group.working, group.shadow.half())


@each_implementation
@settings(deadline=None, max_examples=15)
@given(
    st.sampled_from([1, 17, 1024, 1040, 9000, 70_000]),
    st.sampled_from([torch.float32, torch.float16]),
    st.integers(1, 10**6),
    st.sampled_from([1.0, 0.25, 0.0073]),
    st.booleans(),
    st.integers(0, 2**31),
)
def test_any_length_and_gradient(
    implementation: str, n: int, dtype: torch.dtype, step: int, scale: float, decayed: bool, seed: int
) -> None:
    torch.manual_seed(seed)
    group = some(n, dtype)
    exact = Flat(*(tensor.double() for tensor in vars(group).values()))
    given = hyper(step=step, scale=scale)
    with fk.use(implementation, strict=True):
        group.update(given, decayed=decayed)
    exact.update(given, decayed=decayed)
    for name in ("master", "exp_avg", "exp_avg_sq", "shadow"):
        near(getattr(group, name).double(), getattr(exact, name), 4)
    assert torch.equal(group.weight, group.master.half())
    assert torch.equal(group.working, group.shadow.half())


@each_implementation
def test_the_average_is_that_of_ema_update(use: str) -> None:
    group = some(5000)
    apart = group.clone()
    given = hyper(step=7)
    group.update(given)
    apart.update(given, shadow=None, working=None)
    fk.ema_update_(apart.shadow, apart.master, given[2], apart.working)
    for one, other in zip(vars(group).values(), vars(apart).values(), strict=True):
        assert torch.equal(one, other)


@each_implementation
def test_a_skipped_step_writes_nothing(use: str) -> None:
    group = some(3000)
    group.grad[5] = torch.nan
    before = group.clone()
    group.update(hyper(skip=1))
    for one, other in zip(vars(group).values(), vars(before).values(), strict=True):
        assert torch.equal(one.nan_to_num(7.0), other.nan_to_num(7.0))


def test_the_reference_steps_as_torch_s_foreach_does() -> None:
    """To the bit: what runs on a device, or in fp64, where the host decides nothing."""
    group, given = some(1000), hyper(step=9, scale=0.5)
    parameter = torch.nn.Parameter(group.master.clone())
    parameter.grad = group.grad * 0.5
    optimizer = torch.optim.AdamW([parameter], lr=1e-3, weight_decay=0.04, betas=BETAS, eps=EPS, foreach=True)
    optimizer.state[parameter] = {
        "step": torch.tensor(8.0), "exp_avg": group.exp_avg.clone(), "exp_avg_sq": group.exp_avg_sq.clone(),
    }  # fmt: skip
    optimizer.step()
    adamw._reference(
        group.master, group.grad, group.exp_avg, group.exp_avg_sq, given, group.weight, group.shadow,
        group.working, *BETAS, EPS, True,
    )  # fmt: skip
    assert torch.equal(group.master, parameter.detach())
    assert torch.equal(group.exp_avg_sq, optimizer.state[parameter]["exp_avg_sq"])


@pytest.mark.parametrize("scale", [1.0, 0.25])
def test_on_the_cpu_it_is_one_fused_pass_that_leaves_the_gradient(scale: float) -> None:
    """The time of torch.optim.AdamW(fused=True), where operations one by one took 14 to 17 times as long."""
    group = some(300)
    gradient = group.grad.clone()
    with fk.use("torch", strict=True), torch.profiler.profile() as profile:
        group.update(hyper(scale=scale))
    ran = [event.key for event in profile.key_averages()]
    assert "aten::_fused_adamw_" in ran
    assert not {"aten::where", "aten::addcdiv", "aten::sqrt"} & set(ran)
    assert torch.equal(group.grad, gradient)


@each_implementation
def test_the_master_may_be_all_there_is(use: str) -> None:
    group, whole = some(100), some(100)
    whole = Flat(*(tensor.clone() for tensor in vars(group).values()))
    whole.update(hyper())
    group.update(hyper(), weight=None, shadow=None, working=None)
    assert torch.equal(group.master, whole.master)
    none = torch.empty(0)
    fk.adamw_ema_(none, none.clone(), none.clone(), none.clone(), hyper())


@each_implementation
def test_no_momentum_of_the_gradient_and_no_memory(use: str) -> None:
    group = some(64)
    group.update(hyper(step=3), betas=(0.0, 0.0), decayed=False)
    torch.testing.assert_close(group.exp_avg, group.grad)
    torch.testing.assert_close(group.exp_avg_sq, group.grad**2)


def test_padding_stays_zero() -> None:
    group = Flat(*(torch.zeros(128) for _ in range(7)))
    group.update(hyper())
    assert not any(bool(tensor.any()) for tensor in vars(group).values())


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"master": torch.zeros(2, 3)}, "master must be flat"),
        ({"master": torch.zeros(6).half()}, "master must be flat"),
        ({"grad": torch.zeros(5)}, "grad must be contiguous and match master"),
        ({"grad": torch.zeros(6, dtype=torch.int32)}, "grad must be floating point"),
        ({"exp_avg": torch.zeros(12)[::2]}, "exp_avg must be contiguous"),
        ({"shadow": torch.zeros(6).half()}, "shadow must be contiguous and match master"),
        ({"shadow": None}, "working is a copy of shadow"),
        ({"betas": (0.9, 1.0)}, "betas must lie in"),
        ({"eps": -1.0}, "eps must be at least 0"),
    ],
)
def test_what_does_not_fit_is_refused(change: dict[str, Any], said: str) -> None:
    group = vars(some(6)) | change
    master, grad, exp_avg, exp_avg_sq = (group.pop(name) for name in ALWAYS)
    with pytest.raises(ValueError, match=said):
        fk.adamw_ema_(master, grad, exp_avg, exp_avg_sq, hyper(), **group)


def test_a_wrong_hyper_and_shared_memory_are_refused() -> None:
    group = some(6)
    with pytest.raises(ValueError, match=f"hyper must be float64 .{len(HYPER)}. of lr, weight_decay"):
        group.update(hyper().float())
    with pytest.raises(ValueError, match="master and shadow must not share memory"):
        group.update(hyper(), shadow=group.master, working=None)
    with pytest.raises(ValueError, match="exp_avg and grad must not share memory"):
        replace(group, grad=group.exp_avg).update(hyper())


def test_it_is_an_op() -> None:
    group = some(64, copy=torch.bfloat16)
    arguments = (
        group.master, group.grad, group.exp_avg, group.exp_avg_sq, hyper(), group.weight, group.shadow,
        group.working, *BETAS, EPS, True, "",
    )  # fmt: skip
    torch.library.opcheck(torch.ops.fastjepa.adamw_ema_.default, arguments)
    with FlopCounterMode(display=False) as counter:
        group.update(hyper())
    assert counter.get_total_flops() == 0
    torch.compile(group.update, fullgraph=True, backend="aot_eager")(hyper())
