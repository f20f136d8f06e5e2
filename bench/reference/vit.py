"""The vision transformer as published with MAE (arXiv:2111.06377) and I-JEPA (arXiv:2301.08243).

Written from the behaviour of that code: images are normalised floats, a convolution embeds every patch,
attention is matrices of scores, nothing is fused. `modern` changes how the same is computed, never what.
Names of parameters are those of `fastjepa.models`, whose state dicts load part by part.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastjepa.models import ViTShape
from fastjepa.models.block import NORM_EPS
from fastjepa.models.positions import sincos_2d

Precision = Literal["fp32", "bf16", "fp16"]
AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


class Attention(nn.Module):
    def __init__(self, width: int, heads: int, modern: bool) -> None:
        super().__init__()
        self.heads, self.modern = heads, modern
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        sequences, length, width = x.shape
        qkv = self.qkv(x).view(sequences, length, 3, self.heads, width // self.heads)
        query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # [S, H, L, d]
        if self.modern:
            out = F.scaled_dot_product_attention(query, key, value)  # [S, H, L, d]
        else:
            scores = (query @ key.transpose(-2, -1)) * (width // self.heads) ** -0.5  # [S, H, L, L]
            out = scores.softmax(dim=-1) @ value  # [S, H, L, d]
        return self.proj(out.transpose(1, 2).reshape(sequences, length, width))


class Mlp(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)): sequences of equal length, [S, L, D] to [S, L, D]."""

    def __init__(self, width: int, heads: int, mlp_ratio: float, modern: bool) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=NORM_EPS)
        self.attn = Attention(width, heads, modern)
        self.norm2 = nn.LayerNorm(width, eps=NORM_EPS)
        self.mlp = Mlp(width, round(width * mlp_ratio))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class PatchEmbed(nn.Module):
    def __init__(self, shape: ViTShape) -> None:
        super().__init__()
        self.proj = nn.Conv2d(shape.channels, shape.width, shape.patch_size, stride=shape.patch_size)

    def forward(self, images: Tensor) -> Tensor:
        return self.proj(images).flatten(2).transpose(1, 2)  # [B, N, D]


class Encoder(nn.Module):
    """The encoder, in two halves, because its user drops tokens in between."""

    pos_embed: Tensor  # [1, N (+ 1), D]

    def __init__(self, shape: ViTShape, modern: bool) -> None:
        super().__init__()
        self.shape = shape
        self.patch_embed = PatchEmbed(shape)
        self.register_buffer("pos_embed", sincos_2d(shape.grid, shape.width, shape.class_token))
        if shape.class_token:
            self.cls_token = nn.Parameter(torch.zeros(1, 1, shape.width))
        self.blocks = nn.ModuleList(
            Block(shape.width, shape.heads, shape.mlp_ratio, modern) for _ in range(shape.depth)
        )
        self.norm = nn.LayerNorm(shape.width, eps=NORM_EPS)

    def embed(self, images: Tensor) -> Tensor:
        """Every patch of normalised images [B, C, H, W], with its position: [B, N, D]."""
        return self.patch_embed(images) + self.pos_embed[:, int(self.shape.class_token) :]

    def forward(self, x: Tensor) -> Tensor:
        """Tokens [B, K, D] through the blocks and the norm; the class token comes first, if there is one."""
        if self.shape.class_token:
            first = self.cls_token + self.pos_embed[:, :1]  # [1, 1, D]
            x = torch.cat([first.expand(x.shape[0], -1, -1), x], dim=1)  # [B, 1 + K, D]
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


def compile_blocks(model: nn.Module, backend: str | Callable[..., Any], dynamic: bool | None) -> None:
    """Have torch.compile make each block of `model`; its parameters keep their names."""
    for module in model.modules():
        if isinstance(module, Block):
            module.compile(backend=backend, dynamic=dynamic)


def decayed(parameters: Iterable[nn.Parameter], weight_decay: float, is_decayed: bool) -> dict[str, object]:
    """A group of an optimizer: those of the parameters that are decayed, or the 1-D ones that are not."""
    chosen = [parameter for parameter in parameters if (parameter.ndim > 1) == is_decayed]
    return {"params": chosen, "weight_decay": weight_decay if is_decayed else 0.0}


def autocast(precision: Precision, device: torch.device) -> torch.autocast:
    """Around fp32 weights; nothing for fp32."""
    dtype = AUTOCAST.get(precision)
    return torch.autocast(device.type, dtype, enabled=dtype is not None)


@contextmanager
def library_settings(device: torch.device, modern: bool) -> Iterator[None]:
    """For one step: cuDNN tries its algorithms for the patch embedding, and `modern` multiplies fp32 in TF32.

    They belong to the process, so they are put back for whatever is measured beside the reference.
    """
    if device.type != "cuda":
        yield
        return
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.benchmark
    matmul.allow_tf32, cudnn.benchmark = modern, True
    try:
        yield
    finally:
        matmul.allow_tf32, cudnn.benchmark = before
