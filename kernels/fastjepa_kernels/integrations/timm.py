"""timm: the attention of its vision transformers runs as packed_attention.

timm's `qkv` is packed already: its output, seen as [B * N, 3, H, d], goes in as it is, and no query, key or
value is permuted or copied.
"""

from typing import Any

from torch import Tensor, fx, nn

from fastjepa_kernels.attention import MAX_HEAD_DIM
from fastjepa_kernels.integrations.swap import Patched, Swapped, swap, why_unknown
from fastjepa_kernels.nn import dense_attention, head_dim_is_taken

_CLASSES = frozenset({"timm.layers.attention.Attention"})
_PARAMETERS = ("x", "attn_mask", "is_causal")
_CHILDREN = frozenset({"qkv", "q_norm", "k_norm", "attn_drop", "norm", "gate", "proj", "proj_drop"})


class PackedTimmAttention(Swapped):
    """Before timm's Attention: its forward, where there is no mask and no dropout of attention weights."""

    fused_attn: bool
    num_heads: int
    qkv: nn.Module
    attn_drop: nn.Dropout
    norm: nn.Module
    gate: nn.Module | None
    proj: nn.Module
    proj_drop: nn.Module

    def forward(self, x: Any, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        if (
            attn_mask is not None
            or is_causal
            or not self.fused_attn  # switched off by those who look at the weights
            or (self.training and self.attn_drop.p > 0)
            or isinstance(x, fx.Proxy)  # a graph of modules and functions is being drawn, not computed
        ):
            return super().forward(x, attn_mask=attn_mask, is_causal=is_causal)
        gate = self.gate(x).sigmoid() if self.gate is not None else None
        qkv = self.qkv(x).unflatten(-1, (3, self.num_heads, -1))  # [B, N, 3, H, d]
        out = self.norm(dense_attention(qkv).flatten(-2))  # [B, N, H * d]
        if gate is not None:
            out = out * gate
        return self.proj_drop(self.proj(out))


def _why_not(module: Any) -> str | None:
    if unknown := why_unknown(module, _PARAMETERS, _CHILDREN):
        return unknown
    if not head_dim_is_taken(module.head_dim):
        return f"head dim {module.head_dim} is not a multiple of 8 up to {MAX_HEAD_DIM}"
    if not (isinstance(module.q_norm, nn.Identity) and isinstance(module.k_norm, nn.Identity)):
        return "it normalises queries and keys, which would need a copy of them"
    if not module.fused_attn:
        return "its fused_attn is off, so its weights may be looked at"
    return None


def patch_timm(model: nn.Module) -> Patched:
    """Let the attention of a timm model run as `packed_attention`, in place.

    Modules of class timm.layers.Attention, which all `vit_*`, `deit*` and several others have, are taken, in
    whatever the model is wrapped in. A call with a mask, a causal one, and one in training with dropout of
    the attention weights takes timm's own path, as do modules with a head dim that is not a multiple of 8 up
    to 128, with normalised queries and keys, or with `fused_attn` off. Parameters, buffers, hooks and state
    dict stay; results differ by rounding. Calling it again changes nothing. Undo it before torch.jit.script.

    Returns:
        What was replaced: `.names`, `.kept` with reasons, `.undo()`; also a context manager.

    Raises:
        ValueError: `model` is no module, or has no such attention.

    Warns:
        UserWarning: every such module keeps its own attention.
    """
    return swap(model, PackedTimmAttention, _CLASSES, _why_not)
