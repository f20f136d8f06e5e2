"""The vision transformer: an encoder of image patches as a packed stream of tokens."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastjepa_kernels as fk
from fastjepa.models.block import NORM_EPS
from fastjepa.models.positions import sincos_2d
from fastjepa.models.sequences import Sequences, equal_sequences
from fastjepa.models.stack import Stack

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class ViTShape:
    """All that fixes the tensors of an encoder."""

    image_size: tuple[int, int]  # pixels: height, width
    patch_size: int  # pixels
    width: int
    depth: int
    heads: int
    mlp_ratio: float = 4.0
    channels: int = 3
    class_token: bool = False

    def __post_init__(self) -> None:
        if any(side % self.patch_size or side < self.patch_size for side in self.image_size):
            height, width = self.image_size
            raise ValueError(
                f"the image must be a whole number of patches on each side: {height} x {width} pixels "
                f"with patches of {self.patch_size}; the nearest sizes that fit are "
                f"{_nearest_multiple(height, self.patch_size)} x {_nearest_multiple(width, self.patch_size)}"
            )

    @property
    def grid(self) -> tuple[int, int]:
        """Patches per column and per row."""
        return self.image_size[0] // self.patch_size, self.image_size[1] // self.patch_size


def _nearest_multiple(value: int, divisor: int) -> int:
    return max(divisor, round(value / divisor) * divisor)


class PatchEmbed(nn.Module):
    """One GEMM over flattened patches, with the weight kept as that of a Conv2d."""

    def __init__(self, channels: int, width: int, patch_size: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(channels, width, kernel_size=patch_size, stride=patch_size)

    def forward(self, patches: Tensor) -> Tensor:
        return F.linear(patches, self.proj.weight.flatten(1), self.proj.bias)


class VisionTransformer(nn.Module):
    """ViT encoder with fixed sine-cosine positions, as in I-JEPA; with a class token, as in MAE.

    Args:
        shape: sizes.
        pixel_mean, pixel_std: per channel, for uint8 images, which are divided by 255 first.
    """

    pos_embed: Tensor  # [1, N (+ 1), D]

    def __init__(
        self,
        shape: ViTShape,
        pixel_mean: tuple[float, ...] = IMAGENET_MEAN,
        pixel_std: tuple[float, ...] = IMAGENET_STD,
    ) -> None:
        super().__init__()
        for name, values in (("pixel_mean", pixel_mean), ("pixel_std", pixel_std)):
            if len(values) != shape.channels:
                raise ValueError(f"{name} has {len(values)} values for {shape.channels} channels")
        self.shape = shape
        self.pixel_mean, self.pixel_std = tuple(pixel_mean), tuple(pixel_std)
        self.patch_embed = PatchEmbed(shape.channels, shape.width, shape.patch_size)
        self.register_buffer("pos_embed", sincos_2d(shape.grid, shape.width, shape.class_token))
        if shape.class_token:
            self.cls_token = nn.Parameter(torch.zeros(1, 1, shape.width))
        self.blocks = Stack(shape.depth, shape.width, shape.heads, shape.mlp_ratio)
        self.norm = nn.LayerNorm(shape.width, eps=NORM_EPS)

    def patches(
        self,
        images: Tensor,
        index: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        dtype: torch.dtype | None = None,
    ) -> Tensor:
        """Normalised pixels of the patches at `index`, flattened: [B, K, C p p] or packed [T, C p p].

        uint8 images are normalised by the model's mean and std; floating-point ones are taken as
        already normalised. `dtype` is by default that of the model's weights.
        """
        channels, (height, width) = self.shape.channels, self.shape.image_size
        if images.ndim != 4 or images.shape[1:] != (channels, height, width):
            raise ValueError(
                f"this model takes images of [B, {channels}, {height}, {width}], got {list(images.shape)}"
            )
        raw = images.dtype == torch.uint8
        return fk.patchify_gather(
            images,
            index,
            self.shape.patch_size,
            mean=self.pixel_mean if raw else None,
            std=self.pixel_std if raw else None,
            dtype=dtype or self.norm.weight.dtype,
            cu_seqlens=cu_seqlens,
        )

    def embed(
        self,
        images: Tensor,
        index: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        longest: int | None = None,
    ) -> tuple[Tensor, Sequences]:
        """Tokens with their positions, before the first block.

        Args:
            images: [B, C, H, W] uint8, or floating point and already normalised.
            index: patches to see: [B, K], or packed [T] with `cu_seqlens`; None for all.
            cu_seqlens: int32 [B + 1].
            longest: a bound of the lengths that it cuts; by default all patches of an image.

        Returns:
            x [T, D] and how it is cut into B sequences.
        """
        x = self.patch_embed(self.patches(images, index, cu_seqlens))  # [B, K, D] or [T, D]
        table = self.pos_embed.to(x.dtype)  # an engine may cast parameters alone
        positions = table[0, 1:] if self.shape.class_token else table[0]  # [N, D]
        x = x + (positions if index is None else positions[index.long()])
        if cu_seqlens is not None:
            if self.shape.class_token:
                raise ValueError("a class token needs contexts of equal length, not cu_seqlens")
            return x, Sequences(cu_seqlens, longest or positions.shape[0])
        if self.shape.class_token:
            x = torch.cat([(self.cls_token + table[:, :1]).expand(x.shape[0], -1, -1), x], dim=1)
        return x.flatten(0, 1), equal_sequences(x.shape[0], x.shape[1], x.device)

    def forward(
        self,
        images: Tensor,
        index: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        final_norm: bool = True,
        rows: Tensor | None = None,
        longest: int | None = None,
    ) -> Tensor:
        """Encode the patches at `index`; arguments as in `embed`.

        Args:
            final_norm: normalise the result.
            rows: int64 [R], of the stream of all tokens the rows that are wanted; the last block computes
                no others. Each once where a gradient is wanted.

        Returns:
            [B, K, D] (a class token comes first), or [T, D] if packed, or [R, D] with `rows`.
        """
        x, sequences = self.embed(images, index, cu_seqlens, longest)
        x, delta = self.blocks.run(x, sequences, rows)
        if final_norm:
            x = self.blocks.finish(self.norm, x, delta)
        elif delta is not None:
            x = x + delta
        if rows is not None or cu_seqlens is not None:
            return x
        return x.view(sequences.count, sequences.max_seqlen, x.shape[1])
