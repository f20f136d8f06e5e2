"""ema_update_: the exponential moving average of many tensors, in place.

    shadow <- shadow + (1 - momentum) * (source - shadow);  working <- cast(shadow)

Bytes that must move per fp32 parameter: 12, or 14 with a bf16 working copy written in the same pass.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from fastjepa_kernels import choice, ema_triton
from fastjepa_kernels.checks import (
    FLOAT_DTYPES,
    require,
    require_float,
    require_writable,
    shape_of,
    values_are_checked,
)
from fastjepa_kernels.choice import Way, Ways
from fastjepa_kernels.overlap import find_shared, is_dense
from fastjepa_kernels.philox import LOW32
from fastjepa_kernels.rounding import StochasticRounding, round_to_bfloat16

Tensors = Sequence[Tensor]

# --------------------------------------------------------------------------------------- reference


def _weight(momentum: float | Tensor) -> Any:
    """1 - momentum: of a float in double precision, of a tensor in at least fp32."""
    if isinstance(momentum, Tensor) and momentum.dtype != torch.float64:
        return 1 - momentum.float()
    return 1 - momentum


def _reference(
    shadow: Tensors,
    source: Tensors,
    working: Tensors,
    momentum: float | Tensor,
    rounding: StochasticRounding | None,
) -> None:
    weight = _weight(momentum)
    dtypes = {tensor.dtype for tensor in (*shadow, *source)}
    if isinstance(weight, float) and dtypes in ({torch.float32}, {torch.float64}):
        torch._foreach_lerp_(list(shadow), list(source), weight)
    else:
        for i, (average, new) in enumerate(zip(shadow, source, strict=True)):
            wide = torch.float64 if average.dtype == torch.float64 else torch.float32
            by = weight.to(wide) if isinstance(weight, Tensor) else weight
            moved = average.to(wide).lerp_(new.to(wide), by)  # in place where average is wide
            if rounding is not None:
                assert rounding.parameters is not None
                assert rounding.offsets is not None
                moved = round_to_bfloat16(moved, rounding, rounding.parameters[i], rounding.offsets[i])
            if moved is not average:
                average.copy_(moved)
    if working:
        torch._foreach_copy_(list(working), list(shadow))


# ------------------------------------------------------------------------------------------ Triton


def _walked_alike(tensors: Tensors, row_major: bool) -> bool:
    """Whether going through the memory of each meets its elements in the same order."""
    return all(map(Tensor.is_contiguous, tensors)) or (
        not row_major and all(map(is_dense, tensors)) and len({tensor.stride() for tensor in tensors}) == 1
    )


def _choose(values: Sequence[Any] | None, places: list[int]) -> list[Any]:
    return [values[i] for i in places] if values else []


def _triton(
    shadow: Tensors,
    source: Tensors,
    working: Tensors,
    momentum: float | Tensor,
    rounding: StochasticRounding | None,
) -> None:
    if all(map(Tensor.is_contiguous, (*shadow, *source, *working))):
        ema_triton.update(shadow, source, working, momentum, rounding)
        return
    groups = zip(shadow, source, *[working] if working else [], strict=True)
    # The kernel goes through memory, random words by the row-major order.
    alike = [_walked_alike(group, row_major=rounding is not None) for group in groups]
    for run, is_alike in ((ema_triton.update, True), (_reference, False)):
        here = [i for i, this in enumerate(alike) if this == is_alike]
        rounded = rounding and replace(
            rounding, parameters=_choose(rounding.parameters, here), offsets=_choose(rounding.offsets, here)
        )
        if here:
            run(_choose(shadow, here), _choose(source, here), _choose(working, here), momentum, rounded)


# -------------------------------------------------------------------------------------- C++ and CUDA


def _cpp(
    shadow: Tensors,
    source: Tensors,
    working: Tensors,
    momentum: float | Tensor,
    rounding: StochasticRounding | None,
) -> None:
    torch.ops.fastjepa_native.ema_update_(shadow, source, float(_weight(momentum)), working)


def _cuda(
    shadow: Tensors,
    source: Tensors,
    working: Tensors,
    momentum: float | Tensor,
    rounding: StochasticRounding | None,
) -> None:
    weight = _weight(momentum)
    on_device = weight.to(torch.float32) if isinstance(weight, Tensor) else None
    value = 0.0 if isinstance(weight, Tensor) else weight
    torch.ops.fastjepa_native.ema_update_cuda_(shadow, source, value, on_device, working)


# ---------------------------------------------------------------------------------------------- op


def _single_precision(shadow: Tensors, source: Tensors, working: Tensors, *_rest: Any) -> bool:
    return torch.float64 not in [tensor.dtype for tensor in (*shadow, *source, *working)]


def _native(
    shadow: Tensors,
    source: Tensors,
    working: Tensors,
    momentum: float | Tensor,
    rounding: StochasticRounding | None,
) -> bool:
    return (
        rounding is None
        and {tensor.dtype for tensor in shadow} == {torch.float32}
        and torch.float64 not in [tensor.dtype for tensor in (*source, *working)]
        and all(map(Tensor.is_contiguous, (*shadow, *source, *working)))
    )


def _several_passes_of_torch(shadow: Tensors, source: Tensors, working: Tensors, *_rest: Any) -> bool:
    # Of fp32 without a copy torch makes one pass over memory as well, a tenth faster.
    return bool(working) or not all(tensor.dtype == torch.float32 for tensor in source)


_WAYS = Ways(
    "ema_update_",
    Way("triton", _triton, takes=_single_precision),
    Way("cuda", _cuda, takes=_native),
    Way("cpp", _cpp, takes=lambda *args: _several_passes_of_torch(*args) and _native(*args)),
    Way("torch", _reference),
    size=lambda shadow, *_rest: (len(shadow), sum(map(Tensor.numel, shadow))),
)


def _require_momentum(momentum: float) -> None:
    require(0 <= momentum <= 1, lambda: f"momentum must lie in [0, 1], got {momentum}")


def _check_written(shadow: Tensors, source: Tensors, working: Tensors) -> None:
    written = [*shadow, *working]

    def name(place: int) -> str:
        for what, tensors in (("shadow", shadow), ("working", working)):
            if place < len(tensors):
                return f"{what}[{place}]"
            place -= len(tensors)
        return f"source[{place}]"

    shared = find_shared(written, source)
    if shared is not None:
        first, second = map(name, shared)
        both = f"elements of {first}" if first == second else f"{first} and {second}"
        raise ValueError(f"{both} must not share memory")
    require_writable(written, name)


# Not by torch.library.custom_op, whose wrappers turn lists of hundreds of tensors from C++ to Python and back
# three times at every step. This does it once.
torch.library.define(
    "fastjepa::ema_update_",
    "(Tensor(a!)[] shadow, Tensor[] source, Tensor(b!)[] working, float momentum, Tensor? momentum_tensor, "
    "int? seed, SymInt step, Tensor? step_tensor, int[] parameters, int[] offsets, str preference) -> ()",
)


@torch.library.impl("fastjepa::ema_update_", "default")
def _ema_update_(
    shadow: Tensors,
    source: Tensors,
    working: Tensors,  # empty without
    momentum: float,  # where there is no tensor
    momentum_tensor: Tensor | None,
    seed: int | None,  # None: no stochastic rounding
    step: int,  # where there is no tensor
    step_tensor: Tensor | None,
    parameters: Sequence[int],
    offsets: Sequence[int],
    preference: str,
) -> None:
    written = [*shadow, *working]
    _check_written(shadow, source, working)
    if momentum_tensor is not None and values_are_checked(momentum_tensor):
        _require_momentum(momentum_tensor.item())
    rounding = None
    if seed is not None:
        rounding = StochasticRounding(seed, step if step_tensor is None else step_tensor, parameters, offsets)
    by = momentum if momentum_tensor is None else momentum_tensor
    _WAYS(preference, shadow[0].device, shadow, source, working, by, rounding)
    torch.autograd.graph.increment_version(written)


@torch.library.register_fake("fastjepa::ema_update_")
def _(*_arguments: Any) -> None:
    return None


@register_flop_formula(torch.ops.fastjepa.ema_update_)
def _flop(*_shapes: Any, **_keywords: Any) -> int:
    return 0  # FLOP counters count matrix products; this moves bytes


# ---------------------------------------------------------------------------------------- for users

_FLOATS = frozenset(FLOAT_DTYPES)


def _check_tensors(shadow: Tensors, **others: Tensors) -> None:
    # At every step, for hundreds of tensors: look at each in turn only to say what is wrong.
    every = [tensor for tensors in (shadow, *others.values()) for tensor in tensors]
    devices = [tensor.device for tensor in every]
    shapes = [tensor.shape for tensor in shadow]
    if (
        _FLOATS.issuperset([tensor.dtype for tensor in every])
        and devices == devices[:1] * len(devices)
        and all([tensor.shape for tensor in tensors] == shapes for tensors in others.values())
    ):
        return
    for name, tensors in others.items():
        require(len(tensors) == len(shadow), f"{name} has {len(tensors)} tensors, shadow has {len(shadow)}")
        for i, (average, other) in enumerate(zip(shadow, tensors, strict=True)):
            require_float(f"shadow[{i}]", average)
            require_float(f"{name}[{i}]", other)
            require(
                average.shape == other.shape and average.device == other.device,
                f"{name}[{i}] must match shadow[{i}], got {shape_of(other)} and {shape_of(average)}",
            )
            require(
                average.device == shadow[0].device,
                f"all tensors must be on one device, got shadow[0] on {shadow[0].device} and shadow[{i}] on "
                f"{average.device}",
            )


def _check_momentum(momentum: float | Tensor, shadow: Tensors) -> None:
    if isinstance(momentum, Tensor):
        require_float("momentum", momentum)
        require(
            momentum.ndim == 0 and all(momentum.device == average.device for average in shadow[:1]),
            f"momentum must be a float, or 0-d on the device of shadow, got {shape_of(momentum)}",
        )
    else:
        _require_momentum(momentum)


def _check_rounding(rounding: StochasticRounding, shadow: Tensors) -> None:
    for i, average in enumerate(shadow):
        require(
            average.dtype == torch.bfloat16,
            f"rounding is for averages in bf16, got shadow[{i}] = {shape_of(average)}",
        )
    step = rounding.step
    if isinstance(step, Tensor):
        require(
            step.ndim == 0 and step.dtype == torch.int64 and step.device == shadow[0].device,
            f"rounding.step must be an integer, or 0-d int64 on the device of shadow, got {shape_of(step)}",
        )
    else:
        require(0 <= step <= LOW32, f"rounding.step must lie in 0..{LOW32}, got {step}")
    for name, numbers, most in (
        ("parameters", rounding.parameters, LOW32),
        ("offsets", rounding.offsets, 2**62),
    ):
        if numbers is not None:
            require(
                len(numbers) == len(shadow),
                f"rounding.{name} has {len(numbers)} entries, shadow has {len(shadow)} tensors",
            )
            for i, number in enumerate(numbers):
                require(0 <= number <= most, f"rounding.{name}[{i}] must lie in 0..{most}, got {number}")


def _number_or_tensor(value: Any, number: float) -> tuple[Any, Tensor | None]:
    """The two arguments that an op needs for one of them; `number` is not used then."""
    return (number, value) if isinstance(value, Tensor) else (value, None)


@torch.no_grad()
def ema_update_(
    shadow: Tensor | Sequence[Tensor],
    source: Tensor | Sequence[Tensor],
    momentum: float | Tensor,
    working: Tensor | Sequence[Tensor] | None = None,
    *,
    rounding: StochasticRounding | None = None,
) -> None:
    """Move `shadow` towards `source`, and copy it to `working` in the same pass.

    In fp32 (fp64 for averages in fp64), by the formula of torch.lerp, which is exact at both ends. Call it
    once on the same tensors before a CUDA graph is captured or torch.compile(mode="reduce-overhead") used.

    Args:
        shadow: tensors of any shapes and strides, or one; fp32 (or fp64) as a rule. In bf16 or fp16 an
            average stalls, because steps below its rounding are lost; in bf16, `rounding` keeps their mean.
        source: the same shapes, floating point.
        momentum: in [0, 1], a float or a 0-d tensor on the device, whose value is checked on the CPU, and on
            a GPU under FASTJEPA_DEBUG=1.
        working: the same shapes, floating point, usually bf16.
        rounding: round averages in bf16 up or down by chance, reproducibly.

    Raises:
        ValueError: a tensor is not floating point, numbers of tensors, shapes or devices differ, momentum
            is out of [0, 1], `rounding` does not fit, what is written shares bytes with anything, or it was
            made in inference mode and this is outside of it; nothing is written then.
    """
    shadows = [shadow] if isinstance(shadow, Tensor) else list(shadow)
    sources = [source] if isinstance(source, Tensor) else list(source)
    copies = [] if working is None else [working] if isinstance(working, Tensor) else list(working)
    _check_tensors(shadows, source=sources, **({} if working is None else {"working": copies}))
    _check_momentum(momentum, shadows)
    seed, step, step_tensor = None, 0, None
    parameters: list[int] = []
    offsets: list[int] = []
    if rounding is not None:
        _check_rounding(rounding, shadows)
        seed = (rounding.seed + 2**63) % 2**64 - 2**63  # its low 64 bits, as an op can take them
        step, step_tensor = _number_or_tensor(rounding.step, 0)
        parameters = list(range(len(shadows)) if rounding.parameters is None else rounding.parameters)
        offsets = list([0] * len(shadows) if rounding.offsets is None else rounding.offsets)
    if shadows:
        torch.ops.fastjepa.ema_update_(
            shadows,
            sources,
            copies,
            *_number_or_tensor(momentum, 0.0),
            seed,
            step,
            step_tensor,
            parameters,
            offsets,
            choice.preference(),
        )
