"""The pre-norm transformer block, over a packed stream of tokens."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastjepa_kernels as fk
from fastjepa.models.sequences import Sequences
from fastjepa_kernels import block as fused

NORM_EPS = 1e-6
_PLAIN = frozenset({Tensor, nn.Parameter})


class CompiledParts(NamedTuple):
    """`begin` and `finish` of a block, compiled."""

    begin: Callable[..., tuple[Tensor, Tensor]]
    finish: Callable[..., tuple[Tensor, Tensor]]


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

    In two parts, `begin` and `finish`, between which rows may be laid out anew. The last sum is handed on
    undone, as two tensors: made where the next norm reads it, it costs no pass of its own.

    Attributes:
        is_fused: take each part's forward and backward pass as `fastjepa_kernels.block` has them. Whatever it
            says, the plain modules run under autocast and torch.compile, for fake tensors and elsewhere than
            on a CPU or a CUDA device, and where a layer has hooks or is not the one that a block makes.
        compiled: what `compile_parts` made. A copy and a pickle of a block are without it.
    """

    compiled: CompiledParts | None = None

    def __init__(self, width: int, heads: int, mlp_ratio: float = 4.0) -> None:
        super().__init__()
        self.is_fused = True
        self.norm1 = nn.LayerNorm(width, eps=NORM_EPS)
        self.attn = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width, eps=NORM_EPS)
        self.mlp = Mlp(width, round(width * mlp_ratio))

    def forward(
        self,
        x: Tensor,
        delta: Tensor | None = None,
        *,
        sequences: Sequences,
        rows: Tensor | None = None,
        spread: Callable[[Tensor], Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The block of x + delta, [T, D] each, as y and what is to be added to it.

        Args:
            x, delta: the stream; without delta x alone.
            sequences: how it is cut, once spread.
            rows: int64 [R], rows that alone go on after the attention, each once where a gradient is wanted.
            spread: lays out what `begin` gives anew, row by row: tokens that are in several sequences need be
                in `x` once.

        Returns:
            [T, D] each, or [R, D] with `rows`.
        """
        total, qkv = self.begin(x, delta)
        if spread is not None:
            total, qkv = spread(total), spread(qkv)
        return self.finish(total, qkv, sequences, rows)

    def begin(self, x: Tensor, delta: Tensor | None) -> tuple[Tensor, Tensor]:
        """total = x + delta [T, D], and its queries, keys and values [T, 3 D]. Row by row."""
        return self._begin(x, delta) if self.compiled is None else self.compiled.begin(x, delta)

    def finish(
        self, total: Tensor, qkv: Tensor, sequences: Sequences, rows: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """The rest of it, as `forward` returns it."""
        finish = self._finish if self.compiled is None else self.compiled.finish
        return finish(total, qkv, sequences, rows)

    def compile_parts(self, **options: Any) -> None:
        """Have each part compiled by torch.compile with these options."""
        parts = torch.compile(self._begin, **options), torch.compile(self._finish, **options)
        self.compiled = CompiledParts(*parts)

    def __getstate__(self) -> dict[str, Any]:
        # They compute with the weights of this very block, and cannot be pickled.
        return {name: value for name, value in self.__dict__.items() if name != "compiled"}

    def _begin(self, x: Tensor, delta: Tensor | None) -> tuple[Tensor, Tensor]:
        norm, qkv = self.norm1, self.attn.qkv
        if self.is_fused and _can_fuse(x, (norm,), (qkv,)):
            return fused.add_norm_linear(x, delta, _norm(norm), _linear(qkv))
        total = x if delta is None else x + delta
        return total, qkv(norm(total))

    def _finish(
        self, total: Tensor, qkv: Tensor, sequences: Sequences, rows: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        cut = fused.Cut(sequences.cu_seqlens, sequences.max_seqlen, sequences.equal)
        proj, norm, mlp = self.attn.proj, self.norm2, self.mlp
        if self.is_fused and _is_as_made(mlp, Mlp) and _can_fuse(total, (norm,), (proj, mlp.fc1, mlp.fc2)):
            layers = _linear(proj), _norm(norm), _linear(mlp.fc1), _linear(mlp.fc2)
            return fused.attend_and_feed(total, qkv, cut, self.attn.heads, *layers, rows)
        heads, head_dim = self.attn.heads, total.shape[1] // self.attn.heads
        parts = qkv.view(-1, 3, heads, head_dim)  # [T, 3, H, d]
        out = fk.packed_attention(parts, cut.cu_seqlens, cut.max_seqlen, equal=cut.equal).flatten(1)  # [T, D]
        if rows is not None:
            out, total = out.index_select(0, rows), total.index_select(0, rows)  # [R, D]
        y = total + proj(out)
        return y, mlp(norm(y))


def add_norm(norm: nn.LayerNorm, x: Tensor, delta: Tensor | None, is_fused: bool) -> Tensor:
    """norm(x + delta): what follows the last block."""
    if is_fused and _can_fuse(x, (norm,)):
        return fused.add_norm(x, delta, _norm(norm))
    return norm(x if delta is None else x + delta)


def _can_fuse(x: Tensor, norms: tuple[nn.Module, ...], linears: tuple[nn.Module, ...] = ()) -> bool:
    """Whether passes that read the weights of these layers do what calling them would do.

    It is asked for each block in each step. Hooks of all modules, such as a FLOP counter's, do not matter.
    """
    if torch.compiler.is_compiling() or type(x) not in _PLAIN:  # a compiler fuses for itself
        return False
    device = x.device.type
    # Autocast would choose a precision for each operation.
    if device not in ("cpu", "cuda") or torch.is_autocast_enabled(device):
        return False
    dtype = x.dtype
    for kind, layers in ((nn.LayerNorm, norms), (nn.Linear, linears)):
        for layer in layers:
            if not _is_as_made(layer, kind):
                return False
            parameters = layer._parameters
            weight, bias = parameters.get("weight"), parameters.get("bias")
            if weight is None or type(weight) not in _PLAIN or type(bias) not in _PLAIN:
                return False
            if weight.dtype is not dtype:  # the modules know what may be mixed
                return False
    return True


def _is_as_made(layer: nn.Module, kind: type[nn.Module]) -> bool:
    return type(layer) is kind and not (
        layer._forward_hooks
        or layer._forward_pre_hooks
        or layer._backward_hooks
        or layer._backward_pre_hooks
        or "forward" in layer.__dict__
    )


def _norm(norm: nn.LayerNorm) -> fused.Norm:
    return fused.Norm(norm.weight, norm.bias, norm.eps)


def _linear(linear: nn.Linear) -> fused.Linear:
    return fused.Linear(linear.weight, linear.bias)
