"""The pre-norm transformer block, over a packed stream of tokens."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastjepa_kernels as fk
from fastjepa.models.sequences import Sequences
from fastjepa_kernels import block as fused

NORM_EPS = 1e-6


class Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        if width % heads or (width // heads) % 8:
            raise ValueError(f"width / heads must be a multiple of 8, got {width} / {heads}")
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)


class Mlp(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)): [T, D] to [T, D].

    In two parts, `begin` and `finish`, between which a caller may lay out rows anew. The last sum is handed
    on undone, as two tensors: made where the next norm reads it, it costs no pass of its own.

    Attributes:
        is_fused: take each part's forward and backward pass as `fastjepa_kernels.block` has them. Under
            autocast and torch.compile the plain modules run whatever it says.
    """

    def __init__(self, width: int, heads: int, mlp_ratio: float = 4.0) -> None:
        super().__init__()
        self.is_fused = True
        self.norm1 = nn.LayerNorm(width, eps=NORM_EPS)
        self.attn = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width, eps=NORM_EPS)
        self.mlp = Mlp(width, round(width * mlp_ratio))

    def forward(self, x: Tensor, sequences: Sequences, rows: Tensor | None = None) -> Tensor:
        """[T, D], or with `rows` int64 [R] the result at those rows alone, [R, D]."""
        y, added = self.finish(*self.begin(x, None), sequences, rows)
        return y + added

    def begin(self, x: Tensor, delta: Tensor | None) -> tuple[Tensor, Tensor]:
        """total = x + delta [T, D], and its queries, keys and values [T, 3 D]. Row by row."""
        if self._runs_fused(x):
            return fused.add_norm_linear(x, delta, _norm(self.norm1), _linear(self.attn.qkv))
        total = x if delta is None else x + delta
        return total, self.attn.qkv(self.norm1(total))

    def finish(
        self, total: Tensor, qkv: Tensor, sequences: Sequences, rows: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """y and what is to be added to it: [T, D] each, or [R, D] with `rows`, which go on alone after the
        attention. Each row once where a gradient is wanted."""
        cut = fused.Cut(sequences.cu_seqlens, sequences.max_seqlen, sequences.equal)
        proj, fc1, fc2 = self.attn.proj, self.mlp.fc1, self.mlp.fc2
        if self._runs_fused(total):
            layers = _linear(proj), _norm(self.norm2), _linear(fc1), _linear(fc2)
            return fused.attend_and_feed(total, qkv, cut, self.attn.heads, *layers, rows)
        heads, head_dim = self.attn.heads, total.shape[1] // self.attn.heads
        parts = qkv.view(-1, 3, heads, head_dim)  # [T, 3, H, d]
        out = fk.packed_attention(parts, cut.cu_seqlens, cut.max_seqlen, equal=cut.equal).flatten(1)  # [T, D]
        if rows is not None:
            out, total = out.index_select(0, rows), total.index_select(0, rows)  # [R, D]
        y = total + proj(out)
        return y, self.mlp(self.norm2(y))

    def _runs_fused(self, x: Tensor) -> bool:
        # Autocast would choose a precision for each operation; a compiler fuses for itself.
        return self.is_fused and not (
            torch.is_autocast_enabled(x.device.type) or torch.compiler.is_compiling()
        )


def add_norm(norm: nn.LayerNorm, x: Tensor, delta: Tensor | None, is_fused: bool) -> Tensor:
    """norm(x + delta): what follows the last block."""
    if is_fused and not torch.is_autocast_enabled(x.device.type):
        return fused.add_norm(x, delta, _norm(norm))
    return norm(x if delta is None else x + delta)


def _norm(norm: nn.LayerNorm) -> fused.Norm:
    return fused.Norm(norm.weight, norm.bias, norm.eps)


def _linear(linear: nn.Linear) -> fused.Linear:
    return fused.Linear(linear.weight, linear.bias)
