"""The pre-norm transformer block, over a packed stream of tokens."""

import torch.nn.functional as F
from torch import Tensor, nn

import fastjepa_kernels as fk
from fastjepa.models.sequences import Sequences

NORM_EPS = 1e-6


class Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        if width % heads or (width // heads) % 8:
            raise ValueError(f"width / heads must be a multiple of 8, got {width} / {heads}")
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, sequences: Sequences) -> Tensor:
        tokens, width = x.shape
        qkv = self.qkv(x).view(tokens, 3, self.heads, width // self.heads)  # [T, 3, H, d]
        cut, longest, equal = sequences.cu_seqlens, sequences.max_seqlen, sequences.equal
        out = fk.packed_attention(qkv, cut, longest, equal=equal)  # [T, H, d]
        return self.proj(out.reshape(tokens, width))


class Mlp(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)): [T, D] to [T, D]."""

    def __init__(self, width: int, heads: int, mlp_ratio: float = 4.0) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=NORM_EPS)
        self.attn = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width, eps=NORM_EPS)
        self.mlp = Mlp(width, round(width * mlp_ratio))

    def forward(self, x: Tensor, sequences: Sequences) -> Tensor:
        x = x + self.attn(self.norm1(x), sequences)
        return x + self.mlp(self.norm2(x))
