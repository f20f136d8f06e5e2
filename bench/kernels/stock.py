"""The best of torch alone in the place of each op: no index as large as the data, no dead work."""

import functools
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def rows(index: Tensor, patches: int) -> Tensor:
    """int64 [..., B * K]: where the patches of [..., B, K] lie in [B * N]."""
    return (torch.arange(index.shape[-2], device=index.device)[:, None] * patches + index).flatten()


def index_select(x: Tensor, index: Tensor, pos: Tensor | None = None) -> Tensor:
    batch, patches, width = x.shape
    taken = x.flatten(0, 1).index_select(0, rows(index, patches)).view(*index.shape, width)
    return taken if pos is None else taken + pos[index]


def take_along_dim(x: Tensor, index: Tensor, pos: Tensor | None = None) -> Tensor:
    taken = torch.take_along_dim(x, index.long().unsqueeze(-1), dim=1)  # broadcast, not written
    return taken if pos is None else taken + pos[index]


def patchify(
    images: Tensor, index: Tensor | None, mean: Tensor, std: Tensor, patch_size: int, dtype: torch.dtype
) -> Tensor:
    """Takes the kept patches as bytes and normalises those alone."""
    batch, channels, height, width = images.shape
    columns = width // patch_size
    grid = images.unflatten(2, (-1, patch_size)).unflatten(4, (columns, patch_size))
    grid = grid.permute(0, 2, 4, 1, 3, 5)  # [B, rows, columns, C, p, p], a view
    if index is None:
        kept = grid.flatten(1, 2)  # [B, N, C, p, p]
    else:
        image = torch.arange(batch, device=images.device)[:, None]
        kept = grid[image, index.div(columns, rounding_mode="floor"), index % columns]  # [B, K, C, p, p]
    scale, shift = (1 / (255 * std))[:, None, None], (-mean / std)[:, None, None]  # [C, 1, 1]
    return torch.addcmul(shift, kept.to(scale.dtype), scale).to(dtype).flatten(2)


@functools.cache
def padding(lengths: tuple[int, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """Where the rows of a packed stream lie in a padded batch, int64 [T], and which of it are keys, bool
    [S, 1, 1, L]. A trainer makes them once for all layers, so making them is not timed."""
    longest = max(lengths)
    allowed = torch.arange(longest) < torch.tensor(lengths)[:, None]  # [S, L]
    return allowed.flatten().nonzero().flatten().to(device), allowed[:, None, None, :].to(device)


def padded(qkv: Tensor, lengths: tuple[int, ...]) -> tuple[Tensor, Tensor | None]:
    """[S, L, 3, H, d] and, where lengths differ, the mask of keys."""
    sequences, longest = len(lengths), max(lengths)
    if min(lengths) == longest:
        return qkv.view(sequences, longest, *qkv.shape[1:]), None
    slot, allowed = padding(lengths, qkv.device)
    filled = qkv.new_zeros(sequences * longest, *qkv.shape[1:]).index_copy(0, slot, qkv)
    return filled.view(sequences, longest, *qkv.shape[1:]), allowed


def unpadded(out: Tensor, lengths: tuple[int, ...]) -> Tensor:
    """[S, L, H, d] to [T, H, d]."""
    flat = out.reshape(-1, *out.shape[2:])
    return flat if len(set(lengths)) == 1 else flat.index_select(0, padding(lengths, out.device)[0])


def attention(qkv: Tensor, lengths: tuple[int, ...]) -> Tensor:
    """scaled_dot_product_attention over a padded batch, by whichever of its backends torch takes."""
    batch, allowed = padded(qkv, lengths)
    query, key, value = batch.permute(2, 0, 3, 1, 4)  # [S, H, L, d] each, views
    out = F.scaled_dot_product_attention(query, key, value, attn_mask=allowed)
    return unpadded(out.transpose(1, 2), lengths)


def loss(prediction: Tensor, hidden: Tensor, index: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The gather first, so that only target tokens are normalised."""
    batch, patches, width = hidden.shape
    wide = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    with torch.no_grad():
        target = hidden.flatten(0, 1).index_select(0, rows(index, patches)).to(wide)  # [M B P, D]
        target = F.layer_norm(target, (width,), weight.to(wide), bias.to(wide), 1e-6)
        target = F.layer_norm(target, (width,))
    return F.smooth_l1_loss(prediction.flatten(0, 2).to(wide), target)


def foreach_lerp(shadow: Sequence[Tensor], source: Sequence[Tensor], momentum: float) -> None:
    matched = [new.to(average.dtype) for average, new in zip(shadow, source, strict=True)]
    torch._foreach_lerp_(list(shadow), matched, 1 - momentum)


def foreach_mul_add(shadow: Sequence[Tensor], source: Sequence[Tensor], momentum: float) -> None:
    torch._foreach_mul_(list(shadow), momentum)
    torch._foreach_add_(list(shadow), list(source), alpha=1 - momentum)


def fused_adamw(
    master: Tensor, grad: Tensor, average: Tensor, square: Tensor, lr: float, decay: float, step: int
) -> None:
    """As torch.optim.AdamW(fused=True) calls it; gradients have to be in the master's precision."""
    torch._fused_adamw_(
        [master],
        [grad.to(master.dtype)],
        [average],
        [square],
        [],
        [torch.full((), float(step), device=master.device)],
        lr=lr,
        beta1=0.9,
        beta2=0.999,
        weight_decay=decay,
        eps=1e-8,
        amsgrad=False,
        maximize=False,
    )
