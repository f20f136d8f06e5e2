"""transformers: the attention of its ViT, I-JEPA and DINOv2 families runs as packed_attention.

Those have a linear layer each for query, key and value, and packed_attention wants their outputs packed.
Concatenating the outputs moves 6 * T * D elements (T tokens, D the width); concatenating the weights moves
6 * D * D, and one GEMM reads the input once instead of three times. So it is the weights that are
concatenated where there are at least D tokens.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastjepa_kernels.attention import MAX_HEAD_DIM
from fastjepa_kernels.integrations.swap import Patched, Swapped, swap, why_unknown
from fastjepa_kernels.nn import dense_attention, head_dim_is_taken

_CLASSES = frozenset(
    f"transformers.models.{module}.modeling_{module}.{name}Attention"
    for module, name in (
        ("deit", "DeiT"),
        ("dinov2", "Dinov2"),
        ("dinov2_with_registers", "Dinov2WithRegisters"),
        ("ijepa", "IJepa"),
        ("vit", "ViT"),
        ("vit_mae", "ViTMAE"),
        ("vit_msn", "ViTMSN"),
    )
)
_PARAMETERS = ("hidden_states", "attention_mask", "kwargs")
_CHILDREN = frozenset({"q_proj", "k_proj", "v_proj", "o_proj"})
# "eager" also returns the weights, "flex_attention" always comes with a mask, and a function that somebody
# registered may compute something else.
_IMPLEMENTATIONS = frozenset({"sdpa", "flash_attention_2", "flash_attention_3", "flash_attention_4"})
# Arguments on their way through the layers that mean nothing to attention.
_INERT = frozenset(
    {"num_items_in_batch", "output_attentions", "output_hidden_states", "output_router_logits"}
)


def _is_plain(linear: nn.Module) -> bool:
    """Whether calling it is F.linear and nothing else: no adapter, quantisation or hook."""
    hooks = (
        linear._forward_hooks,
        linear._forward_pre_hooks,
        linear._backward_hooks,
        linear._backward_pre_hooks,
    )
    return type(linear) is nn.Linear and "forward" not in vars(linear) and not any(hooks)


class PackedTransformersAttention(Swapped):
    """Before a model's attention: its forward, without a mask or dropout, if weights are not asked for."""

    config: Any
    num_attention_heads: int
    attention_dropout: float
    scaling: float
    is_causal: bool
    q_proj: nn.Module
    k_proj: nn.Module
    v_proj: nn.Module
    o_proj: nn.Module

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        if (
            attention_mask is not None
            or self.is_causal
            or (self.training and self.attention_dropout > 0)
            or self.config._attn_implementation not in _IMPLEMENTATIONS
            or kwargs.get("output_attentions")
            or any(value is not None for name, value in kwargs.items() if name not in _INERT)
        ):
            return super().forward(hidden_states, attention_mask, **kwargs)
        packed = self._qkv(hidden_states)  # [B, N, 3 * D]
        qkv = packed.unflatten(-1, (3, self.num_attention_heads, -1))  # [B, N, 3, H, d]
        out = dense_attention(qkv, self.scaling).flatten(-2)  # [B, N, D]
        return self.o_proj(out), None

    def _qkv(self, x: Tensor) -> Tensor:
        projections: tuple[Any, ...] = (self.q_proj, self.k_proj, self.v_proj)
        tokens = x.shape[0] * x.shape[1]
        plain = all(map(_is_plain, projections))
        if tokens < x.shape[2] or not plain or len({each.bias is None for each in projections}) > 1:
            return torch.cat([projection(x) for projection in projections], dim=-1)
        weight = torch.cat([projection.weight for projection in projections])  # [3 * D, D]
        biases = [projection.bias for projection in projections if projection.bias is not None]
        return F.linear(x, weight, torch.cat(biases) if biases else None)


def _why_not(module: Any) -> str | None:
    if unknown := why_unknown(module, _PARAMETERS, _CHILDREN):
        return unknown
    if not head_dim_is_taken(module.head_dim):
        return f"head dim {module.head_dim} is not a multiple of 8 up to {MAX_HEAD_DIM}"
    if module.config._attn_implementation not in _IMPLEMENTATIONS:
        return f"its attention implementation is {module.config._attn_implementation!r}"
    return None


def patch_transformers(model: nn.Module) -> Patched:
    """Let the attention of a transformers model run as `packed_attention`, in place.

    The ViT (also MAE, MSN, DeiT), I-JEPA and DINOv2 (also with registers) families are taken, in whatever the
    model is wrapped in. A call with a mask, one that asks for attention weights, and one in training with
    dropout of them takes the model's own path, as do modules with a head dim that is not a multiple of 8 up
    to 128, and any `attn_implementation` but sdpa and flash attention. Parameters, buffers, hooks, config and
    state dict stay; results differ by rounding. Calling it again changes nothing.

    Query, key and value come out of one GEMM on the concatenated weights where there are at least as many
    tokens as the width and their projections are plain (no adapter, hook or quantisation) and all or none
    have a bias; in training that keeps 3 * D * D elements more per layer until the backward pass.

    Returns:
        What was replaced: `.names`, `.kept` with reasons, `.undo()`; also a context manager.

    Raises:
        ValueError: `model` is no module, or has no such attention.

    Warns:
        UserWarning: every such module keeps its own attention.
    """
    return swap(model, PackedTransformersAttention, _CLASSES, _why_not)
