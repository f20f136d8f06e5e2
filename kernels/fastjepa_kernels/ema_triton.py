"""The Triton kernel of ema_update_: one launch for hundreds of tensors, over a table of their addresses.

The tables of the last 32 sets of tensors are kept on the device. For CUDA graphs that means:

- No table can be made during capture. The same tensors must have been updated before, and fewer than 32
  other sets since; otherwise RuntimeError is raised.
- A replay reads the table, and nothing says when a graph is gone. So a table that was captured stays as long
  as the process: 56 bytes for every 16,384 elements, 300 kB for a ViT-B.
- What a function under torch.compile(mode="reduce-overhead") allocates in its first run lies in memory that
  its graphs use again. There too, the same tensors must have been updated before, outside of it.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastjepa_kernels.language import architecture, tl, triton
from fastjepa_kernels.rounding import StochasticRounding, random_bits, to_bfloat16_bits

_CHUNK = 16384  # elements of a program; a row of the table is a thousandth of their bytes
_BLOCK = 1024


@triton.jit
def _pointer(address, DTYPE: tl.constexpr, ALIGNED: tl.constexpr):
    pointer = address.to(tl.pointer_type(DTYPE))
    # From a number the compiler cannot tell, and then would not load vectors.
    return tl.multiple_of(pointer, 16) if ALIGNED else pointer


@triton.jit
def _move(
    shadow,  # pointers [BLOCK]
    source,  # pointers [BLOCK]
    working,  # pointers [BLOCK] or None
    mask,  # [BLOCK] or None
    weight,  # fp32
    seed,  # int64 or None
    step,  # int64
    parameter,  # int64
    element,  # int64: that of the first pointers
    BLOCK: tl.constexpr,
):
    new = tl.load(source, mask=mask).to(tl.float32)
    average = tl.load(shadow, mask=mask)
    if seed is not None:  # bf16 as integers, because of its bits
        average = (average.to(tl.int32) << 16).to(tl.float32, bitcast=True)
    average = average.to(tl.float32)
    # As torch.lerp does: exact at both ends.
    near = weight < 0.5
    average = tl.fma(tl.where(near, weight, weight - 1.0), new - average, tl.where(near, average, new))
    if seed is not None:
        bits = to_bfloat16_bits(average, random_bits(seed, step, parameter, element, BLOCK))
        tl.store(shadow, bits, mask=mask)
        average = (bits.to(tl.int32) << 16).to(tl.float32, bitcast=True)
    else:
        tl.store(shadow, average.to(shadow.dtype.element_ty), mask=mask)
    if working is not None:
        tl.store(working, average.to(working.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["seed", "step"])
def _ema_kernel(
    table,  # int64 [programs, 7]: see _rows
    momentum,  # a 0-d tensor, or 1 - momentum as a float
    seed,  # int64 or None
    step,  # a 0-d tensor, an integer or None
    SHADOW: tl.constexpr,
    SOURCE: tl.constexpr,
    WORKING: tl.constexpr,  # None without a working copy
    ALIGNED: tl.constexpr,
    IN_MEMORY: tl.constexpr,  # momentum is a tensor
    STEP_IN_MEMORY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = table + tl.program_id(0) * 7
    shadow = _pointer(tl.load(row), SHADOW, ALIGNED)
    source = _pointer(tl.load(row + 1), SOURCE, ALIGNED)
    working = None
    if WORKING is not None:
        working = _pointer(tl.load(row + 2), WORKING, ALIGNED)
    first = tl.load(row + 3).to(tl.int32)
    end = tl.load(row + 4).to(tl.int32)
    parameter = tl.load(row + 5)
    element = tl.load(row + 6)
    weight = momentum
    if IN_MEMORY:
        weight = (1.0 - tl.load(momentum).to(tl.float64)).to(tl.float32)
    if STEP_IN_MEMORY:
        step = tl.load(step)
    inside = tl.arange(0, BLOCK)
    # Loads are vectors only where they have no mask.
    unmasked = tl.where(first == 0, end // BLOCK * BLOCK, 0)
    for start in range(0, unmasked, BLOCK):
        at = start + inside
        copy = None if working is None else working + at
        _move(
            shadow + at, source + at, copy, None,
            weight, seed, step, parameter, element + start, BLOCK,
        )  # fmt: skip
    for start in range(unmasked, end, BLOCK):
        at = start + inside
        copy = None if working is None else working + at
        _move(
            shadow + at, source + at, copy, (at >= first) & (at < end),
            weight, seed, step, parameter, element + start, BLOCK,
        )  # fmt: skip


@dataclass(frozen=True, eq=False)
class _Launch:
    """One launch: of all tensors of the same dtypes, and as well aligned.

    Attributes:
        dtypes: of shadow, source and working, None without one.
        aligned: whether every row begins at multiples of 16 bytes.
        table: int64 [programs, 7] on the device.
        copied: the copy of the table to the GPU.
    """

    dtypes: tuple[torch.dtype | None, ...]
    aligned: bool
    table: Tensor
    copied: torch.cuda.Event | None


_captured: set[_Launch] = set()


def _rows(addresses: Tensor, sizes: Tensor, lead: Tensor, last: Tensor, place: Tensor) -> Tensor:
    """int64 [programs, 7]: three addresses, first and last + 1 element, parameter, element of address 0.

    Random words come in fours of a parameter's elements. So what begins within a four has its addresses
    and `place` moved back by `lead` elements, to where the four begins, and `first` keeps them out.
    """
    chunks = (last + _CHUNK - 1) // _CHUNK  # [n]
    tensor = torch.repeat_interleave(torch.arange(len(chunks), device="cpu"), chunks)  # [programs]
    start = (torch.arange(len(tensor), device="cpu") - (chunks.cumsum(0) - chunks)[tensor]) * _CHUNK
    return torch.cat(
        [
            addresses[tensor] + start[:, None] * sizes[tensor],
            torch.where(start == 0, lead[tensor], 0)[:, None],
            (last[tensor] - start).clamp(max=_CHUNK)[:, None],
            place[tensor] + torch.stack([torch.zeros_like(start), start], dim=1),
        ],
        dim=1,
    )


# Steady state builds and copies nothing; tensors that move at every step push the others out.
@functools.lru_cache(maxsize=32)
def _launches(
    device: torch.device,
    lengths: tuple[int, ...],
    dtypes: tuple[tuple[torch.dtype, ...], ...],
    pointers: tuple[tuple[int, ...], ...],
    parameters: tuple[int, ...],
    offsets: tuple[int, ...],
) -> tuple[_Launch, ...]:
    """For n tensors; `dtypes` and `pointers` are of shadow, source and, if there is one, working."""

    def integers(values: Sequence[Any]) -> Tensor:
        return torch.tensor(values, dtype=torch.int64, device="cpu")

    none = (0,) * len(lengths)
    kinds = list(zip(*dtypes, strict=True))
    sizes = integers([[dtype.itemsize for dtype in kind] + [0] * (3 - len(kind)) for kind in kinds])
    place = integers([parameters or none, offsets or none]).t()  # [n, 2]
    lead = place[:, 1] % 4
    last = lead + integers(lengths)
    addresses = integers([*pointers, *[none] * (3 - len(pointers))]).t() - lead[:, None] * sizes  # [n, 3]
    aligned = (addresses % 16 == 0).all(dim=1).tolist()
    place = place - torch.stack([torch.zeros_like(lead), lead], dim=1)
    launches = []
    groups = list(zip(kinds, aligned, strict=True))
    for kind, is_aligned in dict.fromkeys(groups):
        of = [i for i, group in enumerate(groups) if group == (kind, is_aligned)]
        rows = _rows(addresses[of], sizes[of], lead[of], last[of], place[of])
        if len(rows) == 0:
            continue
        copied = None
        if device.type == "cuda":
            if torch.cuda.is_current_stream_capturing():
                raise RuntimeError("call ema_update_ once with the same tensors before it is captured")
            rows, copied = rows.pin_memory(), torch.cuda.Event()
        table = rows.to(device, non_blocking=True)
        if copied is not None:
            copied.record(torch.cuda.current_stream(device))
        launches.append(_Launch((*kind, *[None] * (3 - len(kind))), is_aligned, table, copied))
    return tuple(launches)


def _keep_until_used(launch: _Launch) -> None:
    """On any stream, under capture too; before the launch."""
    if launch.copied is None:
        return
    if torch.cuda.is_current_stream_capturing():
        _captured.add(launch)  # whoever captures has waited for the device
        return
    stream = torch.cuda.current_stream(launch.table.device)
    stream.wait_event(launch.copied)
    launch.table.record_stream(stream)


def _triton_type(dtype: torch.dtype | None) -> Any:
    return None if dtype is None else getattr(tl, str(dtype).removeprefix("torch."))


def update(
    shadow: Sequence[Tensor],
    source: Sequence[Tensor],
    working: Sequence[Tensor],
    momentum: float | Tensor,
    rounding: StochasticRounding | None,
) -> None:
    """ema_update_ for tensors of up to fp32 that are gone through in the order of memory.

    Which must be the same for all tensors of a place, and with `rounding` row-major.
    """
    lists = [tensors for tensors in (shadow, source, working) if tensors]
    places: tuple[tuple[int, ...], ...] = ((), ())
    if rounding is not None:
        places = tuple(rounding.parameters or ()), tuple(rounding.offsets or ())
    for launch in _launches(
        shadow[0].device,
        tuple(map(Tensor.numel, shadow)),
        tuple(tuple(tensor.dtype for tensor in tensors) for tensors in lists),
        tuple(tuple(map(Tensor.data_ptr, tensors)) for tensors in lists),
        *places,
    ):
        _keep_until_used(launch)
        shadow_type, source_type, working_type = map(_triton_type, launch.dtypes)
        _ema_kernel[(len(launch.table),)](
            launch.table,
            momentum if isinstance(momentum, Tensor) else 1 - momentum,
            None if rounding is None else rounding.seed,
            None if rounding is None else rounding.step,
            SHADOW=shadow_type if rounding is None else tl.int16,
            SOURCE=source_type,
            WORKING=working_type,
            ALIGNED=launch.aligned,
            IN_MEMORY=isinstance(momentum, Tensor),
            STEP_IN_MEMORY=rounding is not None and isinstance(rounding.step, Tensor),
            BLOCK=_BLOCK,
            # 4 elements a thread whatever their size, so that no type needs an exchange between threads.
            num_warps=4 if architecture(shadow[0].device) == 942 else 8,
        )
