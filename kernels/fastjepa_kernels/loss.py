"""jepa_loss: the distance between predicted and actual representations (arXiv:2301.08243, eq. 1).

    h = layer_norm(final_norm(hidden))[index];  loss = mean(smooth_l1(prediction - h))

Bytes that must move: 6 per element of bf16 over the M * B * P target tokens (both inputs once, the
gradient once). Only the rows asked for are normalised: no normalised [B, N, D] tensor is ever held.
The forward pass leaves slope = clamp((prediction - h) / beta, -1, 1), the gradient but for a factor
that only the backward pass knows.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from fastjepa_kernels import choice
from fastjepa_kernels.checks import (
    require,
    require_float,
    require_index,
    require_index_values,
    require_same_device,
    shape_of,
)
from fastjepa_kernels.choice import Way, Ways
from fastjepa_kernels.gradients import refuse_forward_mode, refuse_second_derivative
from fastjepa_kernels.language import tl, triton
from fastjepa_kernels.launch import dense_rows
from fastjepa_kernels.ops import op

# ------------------------------------------------------------------------------------- plain torch


def _chunk(device: torch.device) -> int:
    """Elements that plain torch has in hand at a time: what a core's cache holds, or keeps a GPU busy."""
    return 1 << 17 if device.type == "cpu" else 1 << 24


def _work_dtype(prediction: Tensor, hidden: Tensor) -> torch.dtype:
    return torch.float64 if torch.float64 in (prediction.dtype, hidden.dtype) else torch.float32


def _reference(
    prediction: Tensor,
    hidden: Tensor,
    index: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    norm_eps: float,
    target_eps: float,
    beta: float,
    need_gradient: bool,
) -> tuple[Tensor, Tensor]:
    shape, (batch, patches, width) = prediction.shape, hidden.shape
    work = _work_dtype(prediction, hidden)
    # On the CPU, torch's layer norm takes twice the time without them.
    ones, zeros = hidden.new_ones(width, dtype=work), hidden.new_zeros(width, dtype=work)
    weight = ones if norm_weight is None else norm_weight.to(work)
    bias = zeros if norm_bias is None else norm_bias.to(work)
    image = torch.arange(batch, device=hidden.device)[:, None]  # [B, 1]
    rows = (image * patches + index.long()).flatten()  # [M * B * P]
    hidden, prediction = hidden.reshape(-1, width), prediction.reshape(-1, width)
    total = hidden.new_zeros((), dtype=work)
    slope = _empty_slope(prediction, need_gradient)
    chunk = max(1, _chunk(hidden.device) // width)
    for start in range(0, len(rows), chunk):
        part = slice(start, start + chunk)
        target = hidden.index_select(0, rows[part]).to(work)  # [chunk, D]
        target = F.layer_norm(target, (width,), weight, bias, norm_eps)
        target = F.layer_norm(target, (width,), ones, zeros, target_eps)
        guess = prediction[part].to(work)
        total += F.smooth_l1_loss(guess, target, reduction="sum", beta=beta)
        if need_gradient:
            target = torch.sub(guess, target, out=target)  # now the distance
            torch.div(target.clamp_(-beta, beta), beta, out=slope[part])
    return total / prediction.numel(), slope.view(shape if need_gradient else (0,))


def _empty_slope(prediction: Tensor, need_gradient: bool) -> Tensor:
    return prediction.new_empty(prediction.shape if need_gradient else (0,))


def _reference_backward(slope: Tensor, grad_out: Tensor, in_place: bool = False) -> Tensor:
    out = slope if in_place else torch.empty_like(slope)
    factor = grad_out / slope.numel()  # in the precision of the loss: for large batches it is 0 in fp16
    if slope.dtype == grad_out.dtype:
        return torch.mul(slope, factor, out=out)
    chunk = _chunk(slope.device)
    for part, result in zip(slope.view(-1).split(chunk), out.view(-1).split(chunk), strict=True):
        torch.mul(part.to(grad_out.dtype), factor, out=result)
    return out


# ------------------------------------------------------------------------------------------ Triton


@triton.jit
def _centred(value, inside, width, eps):
    """A plain layer norm of each row; its second pass is over registers."""
    centred = tl.where(inside, value - (tl.sum(value, axis=1) / width)[:, None], 0.0)
    variance = tl.sum(centred * centred, axis=1) / width
    return centred * (1.0 / tl.sqrt(variance + eps))[:, None]


@triton.jit
def _loss_kernel(
    prediction,  # [M, B, P, D]
    hidden,  # [B, N, D]
    index,  # [M, B, P]
    norm_weight,  # [D] or None
    norm_bias,  # [D] or None
    slope,  # [M, B, P, D] or None
    partial,  # [programs], fp32
    tokens,  # M * B * P
    images,  # B
    targets,  # P
    patches,  # N
    width,  # D
    hidden_image_stride,
    hidden_row_stride,
    norm_eps,
    target_eps,
    beta,
    per_element,  # 1 / (M * B * P * D)
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    token = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)
    present = token < tokens
    place = tl.load(index + token, mask=present, other=0).to(tl.int64)
    image = (token // targets % images).to(tl.int64)
    in_width = (column < width)[None, :]
    inside = present[:, None] & in_width
    # Nothing outside of hidden is read, whatever the index says.
    taken = (present & (place >= 0) & (place < patches))[:, None] & in_width
    row = image * hidden_image_stride + place * hidden_row_stride
    target = tl.load(hidden + row[:, None] + column[None, :], mask=taken, other=0.0).to(tl.float32)
    element = (token.to(tl.int64) * width)[:, None] + column[None, :]
    guess = tl.load(prediction + element, mask=inside, other=0.0).to(tl.float32)

    target = _centred(target, inside, width, norm_eps)
    if norm_weight is not None:
        target *= tl.load(norm_weight + column[None, :], mask=in_width, other=0.0).to(tl.float32)
    if norm_bias is not None:
        target += tl.load(norm_bias + column[None, :], mask=in_width, other=0.0).to(tl.float32)
    target = _centred(target, inside, width, target_eps)

    distance = guess - target
    tilt = distance / beta
    tilt = tl.where(tilt > 1.0, 1.0, tl.where(tilt < -1.0, -1.0, tilt))  # a NaN stays one
    # Both branches of smooth L1 at once.
    loss = tilt * (distance - 0.5 * beta * tilt)
    tl.store(partial + tl.program_id(0), tl.sum(tl.sum(loss, axis=1), axis=0) * per_element)
    if slope is not None:
        tl.store(slope + element, tilt.to(slope.dtype.element_ty), mask=inside)


@triton.jit
def _loss_backward_kernel(
    slope,  # [elements]
    grad_out,  # a scalar
    out,  # [elements]
    elements,
    per_element,  # 1 / elements
    BLOCK: tl.constexpr,
):
    element = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    factor = tl.load(grad_out).to(tl.float32) * per_element
    value = tl.load(slope + element, mask=element < elements, other=0.0).to(tl.float32) * factor
    tl.store(out + element, value.to(out.dtype.element_ty), mask=element < elements)


def _triton(
    prediction: Tensor,
    hidden: Tensor,
    index: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    norm_eps: float,
    target_eps: float,
    beta: float,
    need_gradient: bool,
) -> tuple[Tensor, Tensor]:
    _, images, targets, width = prediction.shape
    tokens = index.numel()
    slope = _empty_slope(prediction, need_gradient)
    hidden = dense_rows(hidden)
    columns = triton.next_power_of_2(width)
    # Up to 16 elements a thread from either input, in flight at once, and at most 64 registers.
    warps = min(16, max(4, columns // 256))
    rows = max(1, 2048 // columns)
    programs = triton.cdiv(tokens, rows)
    partial = prediction.new_empty(programs, dtype=torch.float32)
    _loss_kernel[(programs,)](
        prediction.contiguous(),
        hidden,
        index.contiguous(),
        None if norm_weight is None else norm_weight.contiguous(),
        None if norm_bias is None else norm_bias.contiguous(),
        slope if need_gradient else None,
        partial,
        tokens,
        images,
        targets,
        hidden.shape[1],
        width,
        hidden.stride(0),
        hidden.stride(1),
        norm_eps,
        target_eps,
        beta,
        1 / prediction.numel(),
        ROWS=rows,
        COLUMNS=columns,
        num_warps=warps,
    )
    return partial.sum(), slope  # in the same order every time


def _triton_backward(slope: Tensor, grad_out: Tensor, in_place: bool = False) -> Tensor:
    out = slope if in_place else torch.empty_like(slope)
    block = 2048
    _loss_backward_kernel[(triton.cdiv(slope.numel(), block),)](
        slope.view(-1),
        grad_out,
        out,
        slope.numel(),
        1 / slope.numel(),
        BLOCK=block,
        num_warps=4,
    )
    return out


# --------------------------------------------------------------------------------------------- C++


def _cpp(*args: Any) -> tuple[Tensor, Tensor]:
    return torch.ops.fastjepa_native.jepa_loss(*args)


# -------------------------------------------------------------------------------- op and gradient


def _single_precision(*args: Any) -> bool:
    return not any(isinstance(arg, Tensor) and arg.dtype == torch.float64 for arg in args)


_WAYS = Ways(
    "jepa_loss",
    Way("triton", _triton, takes=_single_precision),
    Way("cpp", _cpp),
    Way("torch", _reference),
    size=lambda prediction, hidden, index, *_rest: (index.numel(), hidden.shape[2]),
)
_BACKWARD_WAYS = Ways(
    "jepa_loss_backward",
    Way("triton", _triton_backward, takes=_single_precision),
    Way("torch", _reference_backward),
    size=lambda slope, *_rest: (slope.numel(),),
)


@op("fastjepa::jepa_loss")
def _jepa_loss(
    prediction: Tensor,
    hidden: Tensor,
    index: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    norm_eps: float,
    target_eps: float,
    beta: float,
    need_gradient: bool,
    overwrite_slope: bool,
    preference: str,
) -> tuple[Tensor, Tensor]:
    """The loss, and the slope that its gradient is made of: [M, B, P, D], or [0] without need_gradient.

    With overwrite_slope the caller does not look at the slope, and a last backward pass may turn it into
    the gradient: one [M, B, P, D] less is held.
    """
    require_index_values("index", index, hidden.shape[1])
    return _WAYS(
        preference,
        prediction.device,
        prediction,
        hidden,
        index,
        norm_weight,
        norm_bias,
        norm_eps,
        target_eps,
        beta,
        need_gradient,
    )


@_jepa_loss.register_fake
def _(
    prediction: Tensor,
    hidden: Tensor,
    index: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    norm_eps: float,
    target_eps: float,
    beta: float,
    need_gradient: bool,
    overwrite_slope: bool,
    preference: str,
) -> tuple[Tensor, Tensor]:
    loss = prediction.new_empty((), dtype=_work_dtype(prediction, hidden))
    return loss, _empty_slope(prediction, need_gradient)


@op("fastjepa::jepa_loss_backward")
def _jepa_loss_backward(slope: Tensor, grad_out: Tensor, preference: str) -> Tensor:
    """slope * grad_out / count: the gradient with respect to the prediction."""
    return _BACKWARD_WAYS(preference, slope.device, slope, grad_out)


_jepa_loss_backward.refuse_gradients()


@_jepa_loss_backward.register_fake
def _(slope: Tensor, grad_out: Tensor, preference: str) -> Tensor:
    return torch.empty_like(slope)


@op("fastjepa::jepa_loss_backward_", mutates=("slope",))
def _jepa_loss_backward_(slope: Tensor, grad_out: Tensor, preference: str) -> None:
    """The same where nobody needs the slope any more: it becomes the gradient."""
    _BACKWARD_WAYS(preference, slope.device, slope, grad_out, True)


@_jepa_loss_backward_.register_fake
def _(slope: Tensor, grad_out: Tensor, preference: str) -> None:
    pass


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *_, ctx.need_gradient, ctx.overwrite_slope, ctx.preference = inputs
    _, slope = output
    ctx.mark_non_differentiable(slope)
    ctx.set_materialize_grads(False)  # else zeros of [M, B, P, D] would be made for the slope
    ctx.save_for_backward(slope)


def _backward(ctx: Any, grad_out: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    gradient = None
    if grad_out is not None and ctx.needs_input_grad[0]:
        require(ctx.need_gradient, "jepa_loss was called with need_gradient=False, so it has no gradient")
        if torch.is_grad_enabled():  # under create_graph alone; the slope knows nothing of the prediction
            refuse_second_derivative("jepa_loss")
        (slope,) = ctx.saved_tensors
        if ctx.overwrite_slope and _is_last(slope, grad_out):
            torch.ops.fastjepa.jepa_loss_backward_(slope, grad_out, ctx.preference)
            gradient = slope
        else:
            gradient = torch.ops.fastjepa.jepa_loss_backward(slope, grad_out, ctx.preference)
    return gradient, *[None] * 10


def _is_last(saved: Tensor, grad_out: Tensor) -> bool:
    """Whether no backward pass can follow this one, and it is run rather than traced.

    What a hook of saved_tensors_hooks unpacks is overwritten as well: one that keeps the tensor finds the
    gradient in it afterwards.
    """
    if torch.compiler.is_compiling() or type(saved) is not Tensor or _is_batched(grad_out):
        return False
    # Private to torch: without it, no pass is known to be the last.
    keeps_graph = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", lambda: True)
    return not keeps_graph()


def _is_batched(grad_out: Tensor) -> bool:
    """Whether it stands for several (vmap, is_grads_batched), which all need the slope."""
    functorch = torch._C._functorch
    return functorch.is_batchedtensor(grad_out) or functorch.is_legacy_batchedtensor(grad_out)


_jepa_loss.register_autograd(_backward, setup_context=_save)


@register_flop_formula(
    [
        torch.ops.fastjepa.jepa_loss,
        torch.ops.fastjepa.jepa_loss_backward,
        torch.ops.fastjepa.jepa_loss_backward_,
    ]
)
def _flop(*_shapes: Any, **_keywords: Any) -> int:
    return 0  # FLOP counters count matrix products; this moves bytes


# ---------------------------------------------------------------------------------------- for users


def jepa_loss(
    prediction: Tensor,
    hidden: Tensor,
    index: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    norm_eps: float = 1e-6,
    target_eps: float = 1e-5,
    beta: float = 1.0,
) -> Tensor:
    """Smooth L1 between predictions and the layer-normed target representations.

    Args:
        prediction: [M, B, P, D].
        hidden: [B, N, D], the target encoder's output before its final norm.
        index: [M, B, P] of any integer type: the positions predicted, in 0..N-1; may repeat.
        norm_weight, norm_bias: [D], the target encoder's final norm.
        norm_eps: of the final norm.
        target_eps: of the plain layer norm that follows it.
        beta: where smooth L1 turns from square to absolute; above 0.

    Returns:
        A scalar, in fp32 (float64 if an input is). Differentiable in `prediction` only, and once.

    Raises:
        ValueError: on a wrong shape, dtype or device; on the CPU, and on a GPU under FASTJEPA_DEBUG=1,
            also for an index out of range. Without it a GPU takes zeros for such a row.
    """
    require(prediction.ndim == 4, lambda: f"prediction must be [M, B, P, D], got {shape_of(prediction)}")
    require(hidden.ndim == 3, lambda: f"hidden must be [B, N, D], got {shape_of(hidden)}")
    require_float("prediction", prediction)
    require_float("hidden", hidden)
    require(
        index.shape == prediction.shape[:3],
        lambda: f"index must be [M, B, P] = {list(prediction.shape[:3])}, got {shape_of(index)}",
    )
    require(
        hidden.shape[0] == prediction.shape[1] and hidden.shape[2] == prediction.shape[3],
        lambda: (
            f"prediction and hidden must agree in B and D, got {shape_of(prediction)} and {shape_of(hidden)}"
        ),
    )
    for name, tensor in (("norm_weight", norm_weight), ("norm_bias", norm_bias)):
        require(
            tensor is None or tensor.shape == hidden.shape[2:],
            f"{name} must be [D] with D = {hidden.shape[2]}",
        )
    require(beta > 0, lambda: f"beta must be above 0, got {beta}")
    require(prediction.numel() > 0, lambda: f"prediction is empty: {shape_of(prediction)}")
    require_same_device(
        prediction=prediction, hidden=hidden, index=index, norm_weight=norm_weight, norm_bias=norm_bias
    )
    require_index("index", index)
    refuse_forward_mode("jepa_loss", prediction)
    need_gradient = prediction.requires_grad and torch.is_grad_enabled()
    loss, _slope = torch.ops.fastjepa.jepa_loss(
        prediction,
        hidden.detach(),
        index,
        None if norm_weight is None else norm_weight.detach(),
        None if norm_bias is None else norm_bias.detach(),
        norm_eps,
        target_eps,
        beta,
        need_gradient,
        True,
        choice.preference(),
    )
    return loss
