"""Modules around the ops, with the parameter names of timm, so that its state dicts load.

`PackedAttention` takes a packed stream or a dense batch; `MaskedPatchEmbed` embeds only the patches an index
names, from raw pixels.
"""

import functools
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastjepa_kernels.attention import MAX_HEAD_DIM, packed_attention
from fastjepa_kernels.checks import require, shape_of
from fastjepa_kernels.patchify import patchify_gather


def _equal_lengths(batch: int, tokens: int, device: torch.device) -> Tensor:
    return torch.arange(batch + 1, dtype=torch.int32, device=device) * tokens


@functools.lru_cache(maxsize=64)
def _kept_equal_lengths(batch: int, tokens: int, device: torch.device, _stream: int) -> Tensor:
    # An inference tensor, had the first call been in inference mode, could not be saved for a backward pass.
    with torch.inference_mode(False):
        return _equal_lengths(batch, tokens, device)


def equal_lengths(like: Tensor, batch: int, tokens: int) -> Tensor:
    """cu_seqlens of `batch` sequences of `tokens` tokens: int32 [B + 1] on the device of `like`.

    Made once for each size and kept. Only eager tensors are: one made in a captured graph belongs to the
    graph's memory, one made while tracing to the trace. Each stream has its own, so none is read before it is
    written.
    """
    traced = type(like) is not Tensor or torch.compiler.is_compiling()
    if traced or (like.is_cuda and torch.cuda.is_current_stream_capturing()):
        return _equal_lengths(batch, tokens, like.device)
    stream = torch.cuda.current_stream(like.device).cuda_stream if like.is_cuda else 0
    return _kept_equal_lengths(batch, tokens, like.device, stream)


def dense_attention(qkv: Tensor, scale: float | None = None) -> Tensor:
    """packed_attention of sequences of one length: [B, N, 3, H, d] -> [B, N, H, d], without a copy."""
    batch, tokens = qkv.shape[:2]
    starts = equal_lengths(qkv, batch, tokens)
    out = packed_attention(qkv.flatten(0, 1), starts, tokens, scale, equal=True)
    return out.unflatten(0, (batch, tokens))


def head_dim_is_taken(head_dim: int) -> bool:
    """Whether packed_attention takes heads of this size."""
    return head_dim % 8 == 0 and 0 < head_dim <= MAX_HEAD_DIM


class PackedAttention(nn.Module):
    """Multi-head self-attention within each sequence of a packed stream, or of a dense batch.

    Args:
        width: D, a multiple of `heads`; D / heads must be a multiple of 8 up to 128.
        heads: H.
        qkv_bias, proj_bias: whether the two linear layers have a bias.
        device, dtype: of the parameters.

    Parameters are those of timm's Attention: `qkv.weight` [3 * D, D], `qkv.bias`, `proj.weight` [D, D],
    `proj.bias`.

    Raises:
        ValueError: the head dim is not one that `packed_attention` takes.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        qkv_bias: bool = True,
        proj_bias: bool = True,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        require(
            heads > 0 and width % heads == 0,
            lambda: f"width must be a multiple of heads, got width {width} and {heads} heads",
        )
        require(
            head_dim_is_taken(width // heads),
            lambda: (
                f"width / heads must be a multiple of 8 up to {MAX_HEAD_DIM}, "
                f"got {width} / {heads} = {width // heads}"
            ),
        )
        self.width, self.heads = width, heads
        self.qkv = nn.Linear(width, 3 * width, bias=qkv_bias, device=device, dtype=dtype)
        self.proj = nn.Linear(width, width, bias=proj_bias, device=device, dtype=dtype)

    def forward(self, x: Tensor, cu_seqlens: Tensor | None = None, max_seqlen: int | None = None) -> Tensor:
        """Attend within each sequence.

        Args:
            x: packed [T, D] with `cu_seqlens` and `max_seqlen`, or dense [B, N, D] without them.
            cu_seqlens: int32 [S + 1] on the device of `x`, where each sequence starts.
            max_seqlen: an upper bound of the lengths, known on the host.

        Returns:
            The shape of `x`. Rows past cu_seqlens[-1] hold the bias of `proj`.

        Raises:
            ValueError: `x` has another shape, or comes with only one of the other two; and from
                `packed_attention`.
        """
        packed = cu_seqlens is not None
        require(packed == (max_seqlen is not None), "cu_seqlens and max_seqlen go together, got one of them")
        wanted = "[T, D]" if packed else "[B, N, D], or [T, D] with cu_seqlens,"
        require(
            x.ndim == (2 if packed else 3) and x.shape[-1] == self.width,
            lambda: f"x must be {wanted} with D = {self.width}, got {shape_of(x)}",
        )
        qkv = self.qkv(x).unflatten(-1, (3, self.heads, -1))  # [T, 3, H, d] or [B, N, 3, H, d]
        if cu_seqlens is None or max_seqlen is None:
            out = dense_attention(qkv)
        else:
            out = packed_attention(qkv, cu_seqlens, max_seqlen)
        return self.proj(out.flatten(-2))

    def extra_repr(self) -> str:
        return f"width={self.width}, heads={self.heads}"


class MaskedPatchEmbed(nn.Module):
    """Patch embedding of the patches that an index names; pixels of the others are not read.

    Normalising, unfolding and the choice of patches are one pass over the kept pixels, then one GEMM. There
    are no positions in it: add their rows to what it returns.

    Args:
        patch_size: p.
        channels: C of the images.
        width: D.
        mean, std: per channel, in units of the pixel (divided by 255 if uint8); None for 0 and 1.
        bias: whether the embedding has one.
        device, dtype: of the parameters.

    Parameters are those of a Conv2d, as timm's PatchEmbed has them: `proj.weight` [D, C, p, p], `proj.bias`.

    Raises:
        ValueError: mean or std has not one value for each channel.
    """

    def __init__(
        self,
        patch_size: int,
        channels: int,
        width: int,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        bias: bool = True,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        for name, values in (("mean", mean), ("std", std)):
            require(
                values is None or len(values) == channels,
                f"{name} must have one value for each of {channels} channels, got {values}",
            )
        self.patch_size, self.channels = patch_size, channels
        # Not buffers: the state dict is that of a patch embedding which gets normalised images.
        self.mean = None if mean is None else tuple(float(value) for value in mean)
        self.std = None if std is None else tuple(float(value) for value in std)
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.proj = nn.Conv2d(channels, width, patch_size, stride=patch_size, bias=bias, **factory)

    def forward(
        self, images: Tensor, index: Tensor | None = None, cu_seqlens: Tensor | None = None
    ) -> Tensor:
        """Embed the patches of `index`.

        Args:
            images: [B, C, H, W] uint8 or floating point, H and W multiples of the patch size.
            index: [B, K] of any integer type, patches counted row by row; packed [T] with `cu_seqlens`; None
                for all.
            cu_seqlens: int32 [B + 1], where each image's part of a packed `index` starts.

        Returns:
            [B, K, D], or [T, D] if packed (rows past cu_seqlens[-1] hold the bias), in the dtype of the
            weight, or of autocast (not with weights in float64). Gradient to the parameters.

        Raises:
            ValueError: images have another number of channels, or need a gradient, for which there is none;
                and from `patchify_gather`.
        """
        require(
            images.ndim == 4 and images.shape[1] == self.channels,
            lambda: f"images must be [B, {self.channels}, H, W], got {shape_of(images)}",
        )
        require(
            not (images.requires_grad and torch.is_grad_enabled()),
            "images must not require a gradient: the patches are taken from raw pixels, without one",
        )
        weight = self.proj.weight.flatten(1)  # [D, C * p * p]
        device_type = images.device.type
        # What the GEMM would cast to, so that the patches are written once, in that dtype. Autocast leaves
        # float64 alone.
        autocast = torch.is_autocast_enabled(device_type) and weight.dtype != torch.float64
        dtype = torch.get_autocast_dtype(device_type) if autocast else weight.dtype
        patches = patchify_gather(
            images, index, self.patch_size, self.mean, self.std, dtype, cu_seqlens
        )  # [B, K, C * p * p] or [T, C * p * p]
        return F.linear(patches, weight, self.proj.bias)

    def extra_repr(self) -> str:
        return f"mean={self.mean}, std={self.std}"
