"""jepa_loss: the distance between predicted and actual representations (arXiv:2301.08243, eq. 1).

    h = layer_norm(final_norm(hidden))[index];  loss = mean(smooth_l1(prediction - h))

Bytes that must move: 6 per element over the M * B * P target tokens (both inputs once, the gradient
once). Only the rows asked for are normalised: no normalised [B, N, D] tensor is ever held.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from fastjepa_kernels.checks import (
    require,
    require_float,
    require_index,
    require_same_device,
    shape_of,
)


def _reference(
    prediction: Tensor,
    hidden: Tensor,
    index: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    norm_eps: float,
    target_eps: float,
    beta: float,
) -> Tensor:
    batch, grid, width = hidden.shape
    work = torch.float64 if torch.float64 in (prediction.dtype, hidden.dtype) else torch.float32
    with torch.no_grad():
        rows = torch.arange(batch, device=hidden.device)[:, None] * grid + index.long()  # [M, B, P]
        target = hidden.reshape(batch * grid, width).index_select(0, rows.flatten()).to(work)
        weight = None if norm_weight is None else norm_weight.to(work)
        bias = None if norm_bias is None else norm_bias.to(work)
        target = F.layer_norm(target, (width,), weight, bias, norm_eps)
        target = F.layer_norm(target, (width,), eps=target_eps)  # [M * B * P, D]
    return F.smooth_l1_loss(prediction.to(work).flatten(0, 2), target, beta=beta)


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
        index: [M, B, P] of any integer type: the positions predicted, in 0..N-1.
        norm_weight, norm_bias: [D], the target encoder's final norm.
        norm_eps: of the final norm.
        target_eps: of the plain layer norm that follows it.
        beta: where smooth L1 turns from square to absolute; above 0.

    Returns:
        A scalar, in fp32 (float64 if an input is). Differentiable in `prediction` only.

    Raises:
        ValueError: on a wrong shape, dtype or device; on the CPU also for an index out of range.
    """
    require(prediction.ndim == 4, f"prediction must be [M, B, P, D], got {shape_of(prediction)}")
    require(hidden.ndim == 3, f"hidden must be [B, N, D], got {shape_of(hidden)}")
    require_float("prediction", prediction)
    require_float("hidden", hidden)
    require(
        index.shape == prediction.shape[:3],
        f"index must be [M, B, P] = {list(prediction.shape[:3])}, got {shape_of(index)}",
    )
    require(
        hidden.shape[0] == prediction.shape[1] and hidden.shape[2] == prediction.shape[3],
        f"prediction and hidden must agree in B and D, got {shape_of(prediction)} and {shape_of(hidden)}",
    )
    for name, tensor in (("norm_weight", norm_weight), ("norm_bias", norm_bias)):
        require(
            tensor is None or tensor.shape == hidden.shape[2:],
            f"{name} must be [D] with D = {hidden.shape[2]}",
        )
    require(beta > 0, f"beta must be above 0, got {beta}")
    require(prediction.numel() > 0, f"prediction is empty: {shape_of(prediction)}")
    require_same_device(
        prediction=prediction, hidden=hidden, index=index, norm_weight=norm_weight, norm_bias=norm_bias
    )
    require_index("index", index, hidden.shape[1])
    return _reference(prediction, hidden, index, norm_weight, norm_bias, norm_eps, target_eps, beta)
