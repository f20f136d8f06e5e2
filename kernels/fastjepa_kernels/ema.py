"""ema_update_: the exponential moving average of many tensors, in place.

    shadow <- shadow + (1 - momentum) * (source - shadow);  working <- cast(shadow)

Bytes that must move per fp32 parameter: 12, or 14 with a bf16 working copy written in the same pass.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from fastjepa_kernels.checks import require, require_float, shape_of


def _byte_range(tensor: Tensor) -> tuple[int, int]:
    start = tensor.data_ptr()
    span = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return start, start + (span + 1) * tensor.element_size()


def _check_no_overlap(written: Sequence[Tensor], read: Sequence[Tensor]) -> None:
    """Two tensors that share bytes would see each other half updated."""
    ranges = sorted(
        [(*_byte_range(t), True) for t in written if t.numel()]
        + [(*_byte_range(t), False) for t in read if t.numel()]
    )
    end, end_is_written = 0, False
    for start, stop, is_written in ranges:
        if start < end:
            require(not (is_written or end_is_written), "shadow, source and working must not share memory")
        if stop > end:
            end, end_is_written = stop, is_written


def _reference(
    shadow: Sequence[Tensor],
    source: Sequence[Tensor],
    momentum: float | Tensor,
    working: Sequence[Tensor] | None,
) -> None:
    matched = [s.to(t.dtype) for t, s in zip(shadow, source, strict=True)]
    if isinstance(momentum, Tensor):
        for average, new in zip(shadow, matched, strict=True):
            average.lerp_(new, (1 - momentum).to(average.dtype))
    else:
        torch._foreach_lerp_(list(shadow), matched, 1 - momentum)
    if working is not None:
        torch._foreach_copy_(list(working), list(shadow))


@torch.no_grad()
def ema_update_(
    shadow: Tensor | Sequence[Tensor],
    source: Tensor | Sequence[Tensor],
    momentum: float | Tensor,
    working: Tensor | Sequence[Tensor] | None = None,
) -> None:
    """Move `shadow` towards `source`, and copy it to `working` in the same pass.

    Args:
        shadow: tensors of any shapes, or one flat tensor; fp32 (or fp64) as a rule: an average kept in
            bf16 stalls, because steps below its rounding are lost.
        source: the same shapes, floating point.
        momentum: in [0, 1], a float or a 0-d tensor on the device.
        working: the same shapes, floating point, usually bf16.

    Raises:
        ValueError: a tensor is not floating point, numbers of tensors, shapes or devices differ, momentum
            is out of [0, 1], or memory is shared; nothing is written then.
    """
    shadows = [shadow] if isinstance(shadow, Tensor) else list(shadow)
    sources = [source] if isinstance(source, Tensor) else list(source)
    copies = None if working is None else [working] if isinstance(working, Tensor) else list(working)
    for name, tensors in (("source", sources), ("working", copies)):
        if tensors is None:
            continue
        require(len(tensors) == len(shadows), f"{name} has {len(tensors)} tensors, shadow has {len(shadows)}")
        for i, (average, other) in enumerate(zip(shadows, tensors, strict=True)):
            require_float(f"shadow[{i}]", average)
            require_float(f"{name}[{i}]", other)
            require(
                average.shape == other.shape and average.device == other.device,
                f"{name}[{i}] must match shadow[{i}], got {shape_of(other)} and {shape_of(average)}",
            )
    if isinstance(momentum, Tensor):
        require_float("momentum", momentum)
        require(
            momentum.ndim == 0 and all(momentum.device == average.device for average in shadows),
            f"momentum must be a float, or 0-d on the device of shadow, got {shape_of(momentum)}",
        )
    else:
        require(0 <= momentum <= 1, f"momentum must lie in [0, 1], got {momentum}")
    _check_no_overlap(shadows + (copies or []), sources)
    if shadows:
        _reference(shadows, sources, momentum, copies)
