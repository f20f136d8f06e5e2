"""The Triton kernel of adamw_ema_: one launch over a flat group, each byte of it read and written once.

What all elements have in common (bias corrections, decay) is computed by every program for itself, in double
precision from `hyper` on the device. A program goes on for many elements, so that this costs nothing.
"""

import math
from typing import Any

from torch import Tensor

from fastjepa_kernels.language import architecture, tl, triton

_CHUNK = 8192  # elements of a program
_BLOCK = 1024


@triton.jit
def _move(
    master,  # pointers [BLOCK]; these four always
    grad,
    exp_avg,
    exp_avg_sq,
    weight,  # pointers [BLOCK] or None; these three
    shadow,
    working,
    mask,  # [BLOCK] or None
    scale,  # fp32, as all that follow
    decay,  # what is left of the master
    new_average,  # 1 - beta1
    old_square,  # beta2
    new_square,  # 1 - beta2
    step_size,  # lr / (1 - beta1^step)
    root_scale,  # sqrt(1 - beta2^step)
    eps,
    follow,  # 1 - momentum
):
    gradient = tl.load(grad, mask=mask).to(tl.float32) * scale
    average = tl.load(exp_avg, mask=mask)
    average = tl.fma(new_average, gradient - average, average)
    tl.store(exp_avg, average, mask=mask)
    square = tl.load(exp_avg_sq, mask=mask) * old_square
    square = tl.fma(new_square * gradient, gradient, square)
    tl.store(exp_avg_sq, square, mask=mask)
    root = tl.div_rn(tl.sqrt_rn(square), root_scale) + eps
    new = tl.load(master, mask=mask) * decay - tl.div_rn(average * step_size, root)
    tl.store(master, new, mask=mask)
    if weight is not None:
        tl.store(weight, new.to(weight.dtype.element_ty), mask=mask)
    if shadow is not None:
        old = tl.load(shadow, mask=mask)
        # As torch.lerp and ema_update_ do: exact at both ends.
        near = follow < 0.5
        old = tl.fma(tl.where(near, follow, follow - 1.0), new - old, tl.where(near, old, new))
        tl.store(shadow, old, mask=mask)
        if working is not None:
            tl.store(working, old.to(working.dtype.element_ty), mask=mask)


@triton.jit
def _adamw_kernel(
    master,  # fp32 [n]
    grad,  # [n]
    exp_avg,  # fp32 [n]
    exp_avg_sq,  # fp32 [n]
    weight,  # [n] or None
    shadow,  # fp32 [n] or None
    working,  # [n] or None
    hyper,  # fp64 [6]
    n,
    BETA1: tl.constexpr,
    BETA2: tl.constexpr,
    LOG2_BETA1: tl.constexpr,
    LOG2_BETA2: tl.constexpr,
    EPS: tl.constexpr,
    DECAYED: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    if tl.load(hyper + 4) != 0.0:
        return
    lr = tl.load(hyper)
    decay = (1.0 - lr * tl.load(hyper + 1)).to(tl.float32) if DECAYED else 1.0
    follow = (1.0 - tl.load(hyper + 2)).to(tl.float32)
    step = tl.load(hyper + 3)
    scale = tl.load(hyper + 5).to(tl.float32)
    step_size = (lr / (1.0 - tl.exp2(step * LOG2_BETA1))).to(tl.float32)
    root_scale = tl.sqrt(1.0 - tl.exp2(step * LOG2_BETA2)).to(tl.float32)

    first = tl.program_id(0).to(tl.int64) * CHUNK
    left = tl.minimum(n - first, CHUNK).to(tl.int32)
    inside = tl.arange(0, BLOCK)
    # Loads are vectors only where they have no mask.
    unmasked = left // BLOCK * BLOCK
    for start in range(0, unmasked, BLOCK):
        at = first + start + inside
        weight_at = None if weight is None else weight + at
        shadow_at = None if shadow is None else shadow + at
        working_at = None if working is None else working + at
        _move(
            master + at, grad + at, exp_avg + at, exp_avg_sq + at, weight_at, shadow_at, working_at, None,
            scale, decay, 1.0 - BETA1, BETA2, 1.0 - BETA2, step_size, root_scale, EPS, follow,
        )  # fmt: skip
    if unmasked < left:
        at = first + unmasked + inside
        weight_at = None if weight is None else weight + at
        shadow_at = None if shadow is None else shadow + at
        working_at = None if working is None else working + at
        _move(
            master + at, grad + at, exp_avg + at, exp_avg_sq + at, weight_at, shadow_at, working_at,
            unmasked + inside < left,
            scale, decay, 1.0 - BETA1, BETA2, 1.0 - BETA2, step_size, root_scale, EPS, follow,
        )  # fmt: skip


def _log2(beta: float) -> float:
    return math.log2(beta) if beta > 0 else -1e6  # 0 to the power of any step is 0


def update(
    master: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    hyper: Tensor,
    weight: Tensor | None,
    shadow: Tensor | None,
    working: Tensor | None,
    beta1: float,
    beta2: float,
    eps: float,
    decayed: bool,
) -> None:
    """adamw_ema_ in fp32."""
    n = master.numel()
    chunks: Any = triton.cdiv(n, _CHUNK)
    _adamw_kernel[(chunks,)](
        master, grad, exp_avg, exp_avg_sq, weight, shadow, working, hyper, n,
        BETA1=beta1, BETA2=beta2, LOG2_BETA1=_log2(beta1), LOG2_BETA2=_log2(beta2), EPS=eps, DECAYED=decayed,
        CHUNK=_CHUNK, BLOCK=_BLOCK,
        # 4 elements a thread whatever their size, so that no type needs an exchange between threads.
        num_warps=4 if architecture(master.device) == 942 else 8,
    )  # fmt: skip
