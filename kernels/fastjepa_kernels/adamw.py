"""adamw_ema_: AdamW, the cast to the weights, and the average that follows them, of one flat group, in place.

    exp_avg <- beta1 exp_avg + (1 - beta1) grad;  exp_avg_sq <- beta2 exp_avg_sq + (1 - beta2) grad^2
    master <- (1 - lr decay) master - lr (exp_avg / bias1) / (sqrt(exp_avg_sq / bias2) + eps)
    weight <- cast(master);  shadow <- shadow + (1 - momentum) (master - shadow);  working <- cast(shadow)

Bytes that must move per element: 28 with gradient and weight in bf16, 38 with an fp32 shadow and its bf16
copy. Apart they are 28 and 14, and more where the gradient is widened or the weights are cast in passes of
their own, as torch.optim.AdamW leaves them.
"""

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from fastjepa_kernels import adamw_triton, choice
from fastjepa_kernels.checks import require, require_float, require_same_device, require_writable, shape_of
from fastjepa_kernels.choice import Way, Ways
from fastjepa_kernels.ops import op
from fastjepa_kernels.overlap import find_shared

# What `hyper` holds, in this order.
HYPER = ("lr", "weight_decay", "momentum", "step", "skip", "scale")
LR, WEIGHT_DECAY, MOMENTUM, STEP, SKIP, SCALE = range(len(HYPER))

# --------------------------------------------------------------------------------------- reference


def _reference(
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
    lr, decay, momentum, step, skip, scale = hyper.unbind()  # 0-d, in double precision as torch has its own
    wide = master.dtype

    def put(into: Tensor, new: Tensor) -> None:
        into.copy_(torch.where(skip != 0, into, new))

    # The operations of torch.optim.AdamW, in its order, out of place because they may count for nothing.
    gradient = grad.to(wide) * scale.to(wide)
    average = exp_avg.lerp(gradient, 1 - beta1)
    square = exp_avg_sq.mul(beta2).addcmul_(gradient, gradient, value=1 - beta2)
    root = (square.sqrt() / (1 - beta2**step).sqrt().to(wide)).add_(eps)
    kept = master * (1 - lr * decay).to(wide) if decayed else master
    new = kept.addcdiv(average * (-lr / (1 - beta1**step)).to(wide), root)
    put(exp_avg, average)
    put(exp_avg_sq, square)
    put(master, new)
    if weight is not None:
        put(weight, new.to(weight.dtype))
    if shadow is not None:
        followed = shadow.lerp(new, (1 - momentum).to(wide))
        put(shadow, followed)
        if working is not None:
            put(working, followed.to(working.dtype))


# ------------------------------------------------------------------------------- torch, on the CPU

_PART = 2**16  # elements at a time and thread: what one pass leaves in the cache, the next finds there


def _torch(
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
    if master.device.type != "cpu" or master.dtype != torch.float32:
        _reference(
            master, grad, exp_avg, exp_avg_sq, hyper, weight, shadow, working, beta1, beta2, eps, decayed
        )
        return
    # In place, by torch's own fused pass, because the host may look at what decides.
    lr, decay, momentum, step, skip, scale = hyper.tolist()
    if skip:
        return
    count = torch.tensor(step, dtype=torch.float32)
    elements = _PART * torch.get_num_threads()
    for start in range(0, master.numel(), elements):
        part = slice(start, start + elements)
        moved, new = master[part], grad[part]
        gradient = new.to(torch.float32)
        if scale != 1:  # torch's own grad_scale would be written back into the gradient
            gradient = gradient * scale if gradient is new else gradient.mul_(scale)
        torch._fused_adamw_(
            [moved], [gradient], [exp_avg[part]], [exp_avg_sq[part]], [], [count], lr=lr, beta1=beta1,
            beta2=beta2, weight_decay=decay * decayed, eps=eps, amsgrad=False, maximize=False,
        )  # fmt: skip
        if weight is not None:
            weight[part].copy_(moved)
        if shadow is not None:
            torch._foreach_lerp_([shadow[part]], [moved], 1 - momentum)
            if working is not None:
                working[part].copy_(shadow[part])


# ---------------------------------------------------------------------------------------------- op


def _single_precision(master: Tensor, grad: Tensor, *rest: Any) -> bool:
    return torch.float64 not in (master.dtype, grad.dtype)


_WAYS = Ways(
    "adamw_ema_",
    Way("triton", adamw_triton.update, takes=_single_precision),
    Way("torch", _torch),
    size=lambda master, *_rest: (master.numel(),),
)
_WRITTEN = ("master", "exp_avg", "exp_avg_sq", "weight", "shadow", "working")


@op("fastjepa::adamw_ema_", mutates=_WRITTEN)
def _adamw_ema_(
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
    preference: str,
) -> None:
    written = dict(zip(_WRITTEN, (master, exp_avg, exp_avg_sq, weight, shadow, working), strict=True))
    given = {name: tensor for name, tensor in written.items() if tensor is not None}
    names = [*given, "grad", "hyper"]
    shared = find_shared(list(given.values()), [grad, hyper])
    if shared is not None:
        raise ValueError(f"{' and '.join(sorted({names[i] for i in shared}))} must not share memory")
    require_writable(list(given.values()), names.__getitem__)
    _WAYS(
        preference, master.device, master, grad, exp_avg, exp_avg_sq, hyper, weight, shadow, working,
        beta1, beta2, eps, decayed,
    )  # fmt: skip


@_adamw_ema_.register_fake
def _(*_arguments: Any) -> None:
    return None


@register_flop_formula(torch.ops.fastjepa.adamw_ema_)
def _flop(*_shapes: Any, **_keywords: Any) -> int:
    return 0  # FLOP counters count matrix products; this moves bytes


# ---------------------------------------------------------------------------------------- for users


@torch.no_grad()
def adamw_ema_(
    master: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    hyper: Tensor,
    *,
    weight: Tensor | None = None,
    shadow: Tensor | None = None,
    working: Tensor | None = None,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    decayed: bool = True,
) -> None:
    """One step of AdamW on a flat group of parameters, and of the average that follows them.

    As torch.optim.AdamW steps (Loshchilov & Hutter, arXiv:1711.05101; eps is added to the root), and then
    as `ema_update_` moves an average. Nothing comes from the host: a CUDA graph of it can be replayed with
    other rates.

    Args:
        master: [n] contiguous, fp32 (or fp64), the weights that the optimizer moves.
        grad: [n] floating point.
        exp_avg, exp_avg_sq: [n] as the master: the moments.
        hyper: float64 [6] on the device: learning rate, weight decay, momentum of the average, the count of
            steps with this one, whether to skip (if it is not 0, nothing at all is written), and what the
            gradient is multiplied by, for clipping and for sums over micro-batches.
        weight: [n] floating point, gets a copy of the master: what the network computes with.
        shadow: [n] as the master: the average.
        working: [n] floating point, gets a copy of the shadow.
        betas: of the moments.
        eps: added to the root of the second moment.
        decayed: whether weight decay is for this group.

    Raises:
        ValueError: a wrong shape, dtype, layout or device, a working copy without a shadow, betas or eps out
            of range, or shared memory; nothing is written then.
    """
    floats = {"grad": grad, "weight": weight, "working": working}
    alike = {"exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq, "shadow": shadow}
    require(
        master.ndim == 1 and master.dtype in (torch.float32, torch.float64),
        lambda: f"master must be flat, [n] in float32 (or float64), got {shape_of(master)}",
    )
    for name, tensor in {"master": master, **floats, **alike}.items():
        if tensor is None:
            continue
        require_float(name, tensor)
        require(
            tensor.shape == master.shape
            and tensor.is_contiguous()
            and (name not in alike or tensor.dtype == master.dtype),
            lambda name=name, tensor=tensor: (  # type: ignore[misc]
                f"{name} must be contiguous and match master, {shape_of(master)}, got {shape_of(tensor)}"
            ),
        )
    require(
        hyper.shape == (len(HYPER),) and hyper.dtype == torch.float64 and hyper.is_contiguous(),
        lambda: f"hyper must be float64 [{len(HYPER)}] of {', '.join(HYPER)}, got {shape_of(hyper)}",
    )
    require_same_device(master=master, hyper=hyper, **floats, **alike)
    require(working is None or shadow is not None, "working is a copy of shadow, and there is none")
    require(all(0 <= beta < 1 for beta in betas), lambda: f"betas must lie in [0, 1), got {betas}")
    require(eps >= 0, lambda: f"eps must be at least 0, got {eps}")
    if master.numel() > 0:
        torch.ops.fastjepa.adamw_ema_(
            master, grad, exp_avg, exp_avg_sq, hyper, weight, shadow, working,
            *betas, eps, decayed, choice.preference(),
        )  # fmt: skip
