"""The attentive probe: one query that asks all patch tokens, trained on frozen features.

V-JEPA, arXiv:2404.08471: cross-attention with a learnable query, added back to the query, an MLP with a
residual of its own, LayerNorm, a linear classifier. Encoders trained to predict tokens are not trained to
be averaged; this probe finds what a mean over tokens loses.

There is one query and it is the same for every image. So of a head's scores q . (W_k x + b_k) the part
W_k^T q is computed once, b_k falls out of the softmax, and W_v is applied to the weighted mean of tokens
instead of to each token (the weights sum to 1). This is the same function, in 4 N D H instead of 4 N D^2
FLOPs for each image: keys and values of the N tokens are never made.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastjepa.evaluation.sweep import rate_at

_HEAD_WIDTH = 64
_MLP_RATIO = 4
_INITIAL_STD = 0.02

# The labelled tokens of an epoch: [b, N, D] of any float type, and int64 [b], in an order of the epoch's own.
Epoch = Callable[[int], Iterable[tuple[Tensor, Tensor]]]


@dataclass(frozen=True)
class AttentiveSettings:
    """Attributes:
    epochs: over the training images.
    batch: images of a step.
    lr: of AdamW at its peak; it rises linearly over a tenth of the steps and falls to 0 as a cosine.
    weight_decay: of AdamW, on matrices.
    """

    epochs: int = 20
    batch: int = 256
    lr: float = 1e-3
    weight_decay: float = 0.01


class AttentiveProbe(nn.Module):
    """Tokens [B, N, D] -> logits [B, classes].

    Args:
        width: D of the tokens.
        classes: how many.
        heads: of the attention; by default one for every 64 dimensions, at least one, that divides the width.
        generator: of the initial weights.
    """

    def __init__(
        self, width: int, classes: int, heads: int | None = None, generator: torch.Generator | None = None
    ) -> None:
        super().__init__()
        self.heads = heads or next(h for h in range(max(1, width // _HEAD_WIDTH), 0, -1) if width % h == 0)
        self.query = nn.Parameter(torch.zeros(width))
        self.q, self.k, self.v = (nn.Linear(width, width) for _ in range(3))
        self.norm_mlp = nn.LayerNorm(width)
        self.mlp = nn.Sequential(
            nn.Linear(width, _MLP_RATIO * width), nn.GELU(), nn.Linear(_MLP_RATIO * width, width)
        )
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, classes)
        # Keys' bias changes no attention weight, so it would stay as it is.
        self.k.register_parameter("bias", None)
        for parameter in self.parameters():
            if parameter.ndim > 1 or parameter is self.query:
                nn.init.trunc_normal_(parameter, std=_INITIAL_STD, generator=generator)
        for module in self.modules():
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.query + self.attend(tokens)  # [B, D]
        x = x + self.mlp(self.norm_mlp(x))
        logits: Tensor = self.head(self.norm(x))
        return logits

    def attend(self, tokens: Tensor) -> Tensor:
        """What the query's heads gather from the tokens [B, N, D], heads side by side: [B, D]."""
        width = tokens.shape[-1] // self.heads
        q = self.q(self.query).view(self.heads, width) / math.sqrt(width)  # [H, d]
        asks = torch.einsum("hd,hdD->hD", q, self.k.weight.view(self.heads, width, -1))  # [H, D]
        weights = (tokens @ asks.T).softmax(dim=1)  # [B, N, H]
        gathered = weights.mT @ tokens  # [B, H, D]
        value = self.v.weight.view(self.heads, width, -1)  # [H, d, D]
        return torch.einsum("bhD,hdD->bhd", gathered, value).flatten(1) + self.v.bias


def fit_attentive(
    epoch: Epoch,
    images: int,
    width: int,
    classes: int,
    device: torch.device | str,
    settings: AttentiveSettings | None = None,
    seed: int = 0,
) -> AttentiveProbe:
    """Train an attentive probe with AdamW on cross-entropy. Nothing is chosen, so nothing is held out.

    Args:
        epoch: gives the training images of an epoch, by its number.
        images: of an epoch, for the schedule.
        width: D of the tokens.
        classes: how many labels there are.
        device: where the probe and its batches are.
        settings: epochs, batch, rate.
        seed: of the initial weights.
    """
    settings = settings or AttentiveSettings()
    probe = AttentiveProbe(width, classes, generator=torch.Generator().manual_seed(seed)).to(device)
    decayed = [p for p in probe.parameters() if p.ndim > 1]
    others = [p for p in probe.parameters() if p.ndim <= 1]
    groups: list[dict[str, Any]] = [
        {"params": decayed, "weight_decay": settings.weight_decay},
        {"params": others},
    ]
    optimizer = torch.optim.AdamW(groups, lr=settings.lr, weight_decay=0.0)
    steps, step = settings.epochs * math.ceil(images / settings.batch), 0
    for number in range(settings.epochs):
        for tokens, labels in epoch(number):
            for group in optimizer.param_groups:
                group["lr"] = settings.lr * rate_at(min(step, steps - 1), steps)
            optimizer.zero_grad()
            F.cross_entropy(probe(tokens.to(device).float()), labels.to(device)).backward()
            optimizer.step()
            step += 1
    return probe


@torch.no_grad()
def attentive_correct(
    probe: AttentiveProbe, batches: Iterable[tuple[Tensor, Tensor]], device: torch.device | str
) -> Tensor:
    """Which images the probe gets right, in the order of the batches of tokens and labels: bool [m]."""
    found = [
        probe(tokens.to(device).float()).argmax(dim=1) == labels.to(device) for tokens, labels in batches
    ]
    return torch.cat(found)
