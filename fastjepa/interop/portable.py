"""An encoder as other tools take it: at the size of their images, and of stock operations alone."""

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastjepa.interop.head import LinearHead
from fastjepa.models import VisionTransformer, ViTShape
from fastjepa.models.block import Block
from fastjepa.models.positions import sincos_2d
from fastjepa.objectives import JEPA, MAE

ENCODERS = ("target", "context")
MOST_PATCHES = (
    2**16
)  # of an image of 4,096 x 4,096 in patches of 16; more is taken for a slip of the keyboard


def choose_encoder(model: JEPA | MAE, encoder: str | None = None) -> VisionTransformer:
    """The encoder that is handed over.

    Args:
        model: what was trained.
        encoder: of a JEPA `target`, the slow average, which the paper evaluates and which None stands for, or
            `context`. An MAE has one encoder and takes None alone.

    Raises:
        ValueError: there is no such encoder.
    """
    if isinstance(model, MAE):
        if encoder not in (None, "context"):
            raise ValueError(f"an MAE has one encoder, and no {encoder} encoder: leave that choice out")
        return model.encoder
    if encoder not in (None, *ENCODERS):
        raise ValueError(f"encoder must be one of {', '.join(ENCODERS)}, got {encoder!r}")
    return model.encoder if encoder == "context" else model.target_encoder


def at_image_size(encoder: VisionTransformer, image_size: tuple[int, int]) -> VisionTransformer:
    """A copy for images of another size, in fp32 on the CPU.

    Its patches lie on the extent of the trained grid, and their sine-cosine positions are computed there; no
    table is interpolated. Sides may differ.

    Args:
        encoder: as trained.
        image_size: pixels: height, width.

    Raises:
        ValueError: a side that is no whole number of patches, far too many patches, or positions that are not
            the sine-cosine ones.
    """
    shape = encoder.shape
    resized = ViTShape(
        image_size,
        shape.patch_size,
        shape.width,
        shape.depth,
        shape.heads,
        shape.mlp_ratio,
        shape.channels,
        shape.class_token,
    )
    patches = resized.grid[0] * resized.grid[1]
    if patches > MOST_PATCHES:
        raise ValueError(
            f"images of {image_size[0]} x {image_size[1]} have {patches:,} patches of {shape.patch_size} x "
            f"{shape.patch_size}, and {MOST_PATCHES:,} are the most that is exported: take smaller images"
        )
    table = encoder.pos_embed.detach().float().cpu()
    if resized != shape:
        trained = sincos_2d(shape.grid, shape.width, shape.class_token)
        if not torch.allclose(table, trained, rtol=0, atol=1e-4):
            raise ValueError(
                "its positions are not the sine-cosine ones of its grid, and only those can be computed for "
                f"images of another size: leave it at {shape.image_size[0]} x {shape.image_size[1]}"
            )
        table = sincos_2d(resized.grid, shape.width, shape.class_token, trained_grid=shape.grid)
    made = VisionTransformer(resized, encoder.pixel_mean, encoder.pixel_std)
    state = {name: tensor.detach().float().cpu() for name, tensor in encoder.state_dict().items()}
    made.load_state_dict(state | {"pos_embed": table})
    return made.eval().requires_grad_(False)


class PortableEncoder(nn.Module):
    """The encoder, from 8-bit pixels to features, in operations that every runtime of torch knows.

    Args:
        encoder: whose weights it shares.
        head: gives logits too.
    """

    mean: Tensor  # [C, 1, 1]
    std: Tensor

    def __init__(self, encoder: VisionTransformer, head: LinearHead | None = None) -> None:
        super().__init__()
        self.encoder = encoder
        self.register_buffer("mean", torch.tensor(encoder.pixel_mean).view(-1, 1, 1))
        self.register_buffer("std", torch.tensor(encoder.pixel_std).view(-1, 1, 1))
        self.head = None if head is None else nn.Linear(*head.weight.T.shape).requires_grad_(False)
        if self.head is not None and head is not None:
            self.head.load_state_dict({"weight": head.weight, "bias": head.bias})

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Tokens and features, and with a head logits.

        Args:
            images: uint8 [B, C, H, W].

        Returns:
            [B, N, D] after the final norm (a class token comes first), the mean of the patches' [B, D], and
            with a head [B, classes].
        """
        encoder = self.encoder
        pixels = (images.float() / 255 - self.mean) / self.std  # [B, C, H, W]
        x = encoder.patch_embed.proj(pixels).flatten(2).transpose(1, 2)  # [B, N, D]
        if encoder.shape.class_token:
            x = torch.cat([encoder.cls_token.expand(x.shape[0], -1, -1), x], dim=1)  # [B, 1 + N, D]
        x = x + encoder.pos_embed
        for block in encoder.blocks:
            x = _run_block(cast(Block, block), x)
        tokens = encoder.norm(x)
        features = tokens[:, int(encoder.shape.class_token) :].mean(dim=1)  # [B, D]
        return (tokens, features) if self.head is None else (tokens, features, self.head(features))


def _run_block(block: Block, x: Tensor) -> Tensor:
    heads = block.attn.heads
    qkv = block.attn.qkv(block.norm1(x)).unflatten(2, (3, heads, -1))  # [B, N, 3, H, d]
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind()  # [B, H, N, d] each
    attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)  # [B, N, D]
    x = x + block.attn.proj(attended)
    return x + block.mlp(block.norm2(x))
