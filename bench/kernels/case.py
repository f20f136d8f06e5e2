"""What is measured: an op at a size, the ways to compute it, and the bytes that must move."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

import fastjepa_kernels as fk

Phase = Literal["forward", "backward", "forward+backward"]
Kind = Literal["fastjepa", "implementation", "published", "stock", "peer", "copy"]
Scale = Literal["small", "cpu", "gpu"]  # small: odd shapes, to be checked rather than timed
DEFAULT = "fastjepa"
CANNOT = "cannot run as"  # how an implementation that was insisted on says that it does not take arguments


@dataclass(frozen=True)
class Random:
    """Fresh random inputs on a device."""

    device: torch.device
    generator: torch.Generator

    @classmethod
    def on(cls, device: torch.device) -> "Random":
        generator = torch.Generator(device)
        generator.seed()  # another one every time
        return cls(device, generator)

    def normal(self, *shape: int, dtype: torch.dtype) -> Tensor:
        return torch.randn(shape, dtype=dtype, device=self.device, generator=self.generator)

    def below(self, bound: int, *shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
        return torch.randint(bound, shape, dtype=dtype, device=self.device, generator=self.generator)

    def kept(self, rows: int, bound: int, kept: int) -> Tensor:
        """int64 [rows, kept]: in each row different numbers below the bound, ascending as masks are."""
        order = torch.rand(rows, bound, device=self.device, generator=self.generator).argsort(dim=1)
        return order[:, :kept].sort(dim=1).values


@dataclass(frozen=True)
class Way:
    """One way to compute an op.

    Attributes:
        name: as it stands in the table.
        kind: "fastjepa" for the op as a user gets it, "implementation" for one of those it chooses from.
        call: with the inputs of the case. What it writes in place, it also returns.
        starts_slowly: it compiles for seconds, so it is left out first where time is short.
    """

    name: str
    kind: Kind
    call: Callable[..., Any]
    starts_slowly: bool = False


@dataclass(frozen=True)
class Case:
    """An op at one size.

    Attributes:
        op: the public name in fastjepa_kernels.
        name: of the size, for people.
        dtype: of the inputs that have a gradient, or of the result.
        make: fresh random inputs.
        ways: on a type of device; the first of kind "stock" is torch's own, by which errors are judged.
        exact: called with the same inputs in float64.
        bytes_moved: that any way must move, by the phases that are measured.
        with_gradient: which of the inputs the backward pass is for.
    """

    op: str
    name: str
    dtype: torch.dtype
    make: Callable[[Random], tuple[Any, ...]]
    ways: Callable[[str], list[Way]]
    exact: Callable[..., Any]
    bytes_moved: Mapping[Phase, int]
    with_gradient: tuple[int, ...] = ()

    def stock(self, device_type: str) -> Way:
        return next(way for way in self.ways(device_type) if way.kind == "stock")

    def __str__(self) -> str:
        return f"{self.op} {self.name} {str(self.dtype).removeprefix('torch.')}"


Compare = Callable[[Case, Phase], None]


def ours(op: str, call: Callable[..., Any], device_type: str) -> list[Way]:
    """The op as it chooses for itself, and each of the implementations it chooses from."""

    try:
        gradients = fk.implementations(f"{op}_backward", device_type)
    except ValueError:  # it has none
        gradients = fk.implementations(op, device_type)

    def insist(implementation: str, *inputs: Any) -> Any:
        # Where an implementation has no gradient of its own, the next best one serves.
        with fk.use(implementation, strict=implementation in gradients):
            return call(*inputs)

    named = [
        Way(f"{DEFAULT}:{name}", "implementation", partial(insist, name))
        for name in fk.implementations(op, device_type)
    ]
    return [Way(DEFAULT, "fastjepa", call), *named]


def tensors_of(result: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]


def map_tensors(change: Callable[[Tensor], Tensor], tree: Any) -> Any:
    return tree_map(lambda leaf: change(leaf) if isinstance(leaf, Tensor) else leaf, tree)


def gradient_of(case: Case, inputs: tuple[Any, ...], random: Random) -> Tensor | None:
    """A random gradient of the result; a scalar's is not 1, so that a factor left out is seen."""
    if not case.with_gradient:
        return None
    with torch.no_grad():
        out = case.stock(random.device.type).call(*inputs)
    return random.normal(*out.shape, dtype=out.dtype)


def arrange(
    case: Case, call: Callable[..., Any], phase: Phase, inputs: tuple[Any, ...], gradient: Tensor | None
) -> Callable[[], Any]:
    """What is run and timed, once. Of a backward pass alone, the forward pass is run here, untimed."""

    def forward() -> Any:
        with torch.no_grad():
            return call(*inputs)

    def with_leaves() -> tuple[Any, list[Tensor]]:
        given = list(inputs)
        for place in case.with_gradient:
            given[place] = inputs[place].detach().requires_grad_()
        return call(*given), [given[place] for place in case.with_gradient]

    def forward_backward() -> Any:
        out, leaves = with_leaves()
        return out.detach(), *torch.autograd.grad(out, leaves, gradient)

    if phase == "forward":
        return forward
    if phase == "forward+backward":
        return forward_backward
    out, leaves = with_leaves()
    return lambda: torch.autograd.grad(out, leaves, gradient, retain_graph=True)
