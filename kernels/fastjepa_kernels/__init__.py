"""Kernels for training vision transformers on part of an image. They need torch alone.

Every op is exact, differentiable where it can be, and works on somebody else's tensors.
"""

from fastjepa_kernels.attention import packed_attention
from fastjepa_kernels.ema import ema_update_
from fastjepa_kernels.gather import gather_tokens
from fastjepa_kernels.loss import jepa_loss
from fastjepa_kernels.patchify import patchify_gather

__all__ = ["ema_update_", "gather_tokens", "jepa_loss", "packed_attention", "patchify_gather"]
