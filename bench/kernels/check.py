"""Whether a way computes what it should, judged before anything is timed."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from bench.kernels.case import (
    CANNOT,
    DEFAULT,
    Case,
    Phase,
    Random,
    Way,
    arrange,
    gradient_of,
    map_tensors,
    tensors_of,
)

ERROR_RATIO = 2.0  # of ours to torch's own in the same dtype


@contextmanager
def poisoned() -> Iterator[None]:
    """Memory that torch hands out holds NaN, so that what nobody writes is seen."""
    before = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    fill = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        torch.utils.deterministic.fill_uninitialized_memory = fill  # type: ignore[attr-defined]


def error(out: Tensor, exact: Tensor) -> float:
    """The root mean square of the error over that of the exact values; infinite for what is not a number."""
    difference = (out.double() - exact.double()).norm()
    relative = difference / exact.double().norm().clamp_min(torch.finfo(torch.float64).tiny)
    return float(relative) if bool(torch.isfinite(out).all()) else float("inf")


def results(case: Case, way: Way, inputs: tuple[Any, ...], gradient: Tensor | None) -> list[Tensor]:
    """What a way returns, and its gradients where it has some, on copies of the inputs."""
    copies = map_tensors(torch.clone, inputs)
    phase: Phase = "forward+backward" if case.with_gradient else "forward"
    return tensors_of(arrange(case, way.call, phase, copies, gradient)())


def exact_results(case: Case, inputs: tuple[Any, ...], gradient: Tensor | None) -> list[Tensor]:
    def widen(tensor: Tensor) -> Tensor:
        return tensor.double() if tensor.is_floating_point() else tensor

    wide = map_tensors(widen, inputs)
    return results(case, Way("exact", "published", case.exact), wide, map_tensors(widen, gradient))


def errors(out: list[Tensor], exact: list[Tensor]) -> list[float]:
    return [error(one, right) for one, right in zip(out, exact, strict=True)]


def judge(out: list[Tensor], exact: list[Tensor], limits: list[float]) -> str:
    """Why this result is refused, "" if it is right: its errors may reach the limits."""
    if [tensor.shape for tensor in out] != [tensor.shape for tensor in exact]:
        return f"shapes {[list(t.shape) for t in out]}, not {[list(t.shape) for t in exact]}"
    for place, (one, right, limit) in enumerate(zip(out, exact, limits, strict=True)):
        # A single number can be right by chance: it may be off by its rounding.
        slack = torch.finfo(one.dtype).eps if one.numel() == 1 else 0.0
        found = error(one, right)
        if not found <= limit + slack:
            return f"result {place} has error {found:.1e}, at most {limit:.1e} is allowed"
    return ""


@dataclass
class Verdicts:
    """Which ways of a case are right; why others are red, or cannot do it at all."""

    right: list[str] = field(default_factory=list)
    red: dict[str, str] = field(default_factory=dict)
    cannot: dict[str, str] = field(default_factory=dict)

    @property
    def ours_are_right(self) -> bool:
        return not any(is_ours(name) for name in self.red)

    @property
    def may_be_timed(self) -> bool:
        """Whether the op as a user gets it is right; an implementation that is not has no number itself."""
        return DEFAULT not in self.red

    def without(self, distrusted: Mapping[str, str]) -> "Verdicts":
        """The same, but these ways, found wrong elsewhere, are red here too."""
        right = [name for name in self.right if name not in distrusted]
        return Verdicts(right, {**distrusted, **self.red}, self.cannot)


def check(case: Case, random: Random, in_time: Callable[[], bool] = lambda: True) -> Verdicts:
    """Judge every way of a case on fresh inputs, forward and backward.

    Ways that start slowly are tried while `in_time` says so.

    An implementation that does not take these arguments is in none of the lists. What torch or a peer
    refuses it cannot do; if ours fails, it is red.
    """
    inputs = case.make(random)
    gradient = gradient_of(case, inputs, random)
    ways = case.ways(random.device.type)
    exact = exact_results(case, inputs, gradient)
    own = errors(results(case, case.stock(random.device.type), inputs, gradient), exact)
    ours = [ERROR_RATIO * each for each in own]
    # Others need only compute the same: matrices of bf16 scores are far less exact than a fused kernel.
    others = [max(20 * each, 2 * torch.finfo(case.dtype).eps) for each in own]

    verdicts = Verdicts()
    for way in ways:
        if way.starts_slowly and not in_time():
            verdicts.cannot[way.name] = "no time was left to start it"
            continue
        try:
            # Others are compiled anew for it, and what they leave unwritten is not ours to find.
            with poisoned() if is_ours(way.name) else nullcontext():
                out = results(case, way, inputs, gradient)
        except Exception as failure:  # in whatever way: it must not end the rest
            if is_ours(way.name) and CANNOT not in str(failure):
                verdicts.red[way.name] = first_line(failure)
            elif not is_ours(way.name):
                verdicts.cannot[way.name] = first_line(failure)
            continue
        why = judge(out, exact, ours if is_ours(way.name) else others)
        if why:
            verdicts.red[way.name] = why
        else:
            verdicts.right.append(way.name)
    return verdicts


def first_line(failure: Exception) -> str:
    return f"{type(failure).__name__}: {failure}".splitlines()[0]


def is_ours(way: str) -> bool:
    return way.split(":")[0] == DEFAULT
