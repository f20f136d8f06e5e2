"""Kernels for training vision transformers on part of an image. They need torch alone.

Every op is exact, differentiable where it can be, and works on somebody else's tensors.
"""

from fastjepa_kernels import block, integrations, nn
from fastjepa_kernels.adamw import adamw_ema_
from fastjepa_kernels.attention import packed_attention
from fastjepa_kernels.averaging import EMA
from fastjepa_kernels.choice import implementations, use
from fastjepa_kernels.ema import ema_update_
from fastjepa_kernels.fp8_linear import fp8_available, fp8_linear
from fastjepa_kernels.fused_quantize import gelu_quantize, layer_norm_quantize
from fastjepa_kernels.gather import gather_tokens
from fastjepa_kernels.loss import jepa_loss
from fastjepa_kernels.patchify import patchify_gather
from fastjepa_kernels.quantize import quantize_rows_
from fastjepa_kernels.rounding import StochasticRounding

__all__ = [
    "EMA",
    "StochasticRounding",
    "adamw_ema_",
    "block",
    "ema_update_",
    "fp8_available",
    "fp8_linear",
    "gather_tokens",
    "gelu_quantize",
    "implementations",
    "integrations",
    "jepa_loss",
    "layer_norm_quantize",
    "nn",
    "packed_attention",
    "patchify_gather",
    "quantize_rows_",
    "use",
]
