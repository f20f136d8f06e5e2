"""What the published I-JEPA code does in the place of each op, written from its behaviour.

They work in any floating dtype: in float64 they are what every other way is checked against.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def apply_masks(x: Tensor, masks: Sequence[Tensor]) -> Tensor:
    """x [B, N, D], masks of [B, K] each: [M * B, K, D], by an int64 index as large as the result."""
    taken = []
    for mask in masks:
        index = mask.long().unsqueeze(-1).repeat(1, 1, x.shape[-1])  # [B, K, D]
        taken.append(torch.gather(x, 1, index))
    return torch.cat(taken)


def gather_tokens(x: Tensor, index: Tensor, pos: Tensor | None = None) -> Tensor:
    """Positions are added to every patch before any is dropped."""
    return apply_masks(x if pos is None else x + pos, [index])


def patchify(
    images: Tensor, index: Tensor | None, mean: Tensor, std: Tensor, patch_size: int, dtype: torch.dtype
) -> Tensor:
    """Normalise every pixel and unfold every patch, as a convolution over the image does; then drop."""
    pixels = (images.to(mean.dtype) / 255 - mean[:, None, None]) / std[:, None, None]  # [B, C, H, W]
    patches = F.unfold(pixels.to(dtype), patch_size, stride=patch_size).transpose(1, 2)  # [B, N, C p p]
    return patches if index is None else apply_masks(patches, [index])


def attention(qkv: Tensor, lengths: Sequence[int]) -> Tensor:
    """qkv [T, 3, H, d] of sequences laid end to end: [T, H, d], by matrices of scores [S, H, L, L].

    The published code has sequences of equal length alone, which are one batch; others are done one by one.
    """
    if len(set(lengths)) > 1:
        return torch.cat([attention(part, [len(part)]) for part in qkv.split(list(lengths))])
    tokens, _, heads, head_dim = qkv.shape
    query, key, value = qkv.view(len(lengths), -1, 3, heads, head_dim).permute(2, 0, 3, 1, 4)  # [S, H, L, d]
    weights = ((query @ key.transpose(-2, -1)) * head_dim**-0.5).softmax(dim=-1)  # [S, H, L, L]
    return (weights @ value).transpose(1, 2).reshape(tokens, heads, head_dim)


def loss(prediction: Tensor, hidden: Tensor, index: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Both norms over every patch, then the gather. Autocast computes all of it in fp32."""
    blocks, batch, kept, width = prediction.shape
    wide = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    with torch.no_grad():
        target = F.layer_norm(hidden.to(wide), (width,), weight.to(wide), bias.to(wide), 1e-6)
        target = F.layer_norm(target, (width,))  # [B, N, D]
        target = apply_masks(target, list(index))  # [M * B, P, D]
    return F.smooth_l1_loss(prediction.flatten(0, 1).to(wide), target)


def ema(shadow: Sequence[Tensor], source: Sequence[Tensor], momentum: float) -> None:
    for average, new in zip(shadow, source, strict=True):
        average.mul_(momentum).add_((1 - momentum) * new)


def adamw(
    master: Tensor, grad: Tensor, average: Tensor, square: Tensor, lr: float, decay: float, step: int
) -> None:
    """torch.optim.AdamW as it steps without `foreach` or `fused`: an operation after another."""
    grad = grad.to(master.dtype)
    master.mul_(1 - lr * decay)
    average.mul_(0.9).add_(grad, alpha=1 - 0.9)
    square.mul_(0.999).addcmul_(grad, grad, value=1 - 0.999)
    root = (square.sqrt() / (1 - 0.999**step) ** 0.5).add_(1e-8)
    master.addcdiv_(average, root, value=-lr / (1 - 0.9**step))


def sample_masks(images: int, side: int, blocks: int = 4, min_keep: int = 10) -> tuple[Tensor, Tensor]:
    """The multi-block sampler: image by image, each block a mask of the grid, its complement, its places.

    Returns:
        The contexts cut to the shortest, [B, K], and the target blocks, [M, B, P].
    """

    def size(scale: tuple[float, float], aspect: tuple[float, float]) -> tuple[int, int]:
        r = float(torch.rand(1))  # the one number gives both scale and aspect
        patches = int(side * side * (scale[0] + r * (scale[1] - scale[0])))
        ratio = aspect[0] + r * (aspect[1] - aspect[0])
        height, width = round((patches * ratio) ** 0.5), round((patches / ratio) ** 0.5)
        return min(height, side - 1), min(width, side - 1)

    def block(height: int, width: int, kept_out: Sequence[Tensor] = ()) -> tuple[Tensor, Tensor]:
        """Places [P] and the complement [side, side] of a block; kept_out hold 0 where it must not be."""
        tries = 0
        while True:
            top, left = torch.randint(0, side - height, (1,)), torch.randint(0, side - width, (1,))
            mask = torch.zeros(side, side, dtype=torch.int32)
            mask[top : top + height, left : left + width] = 1  # the end is excluded above
            for complement in kept_out[: max(len(kept_out) - tries // 20, 0)]:
                mask *= complement
            places = mask.flatten().nonzero()
            tries += 1
            if len(places) > min_keep:
                break
        complement = torch.ones(side, side, dtype=torch.int32)
        complement[top : top + height, left : left + width] = 0
        return places.squeeze(1), complement

    target_size, context_size = size((0.15, 0.2), (0.75, 1.5)), size((0.85, 1.0), (1.0, 1.0))
    contexts, targets = [], []
    for _ in range(images):
        drawn = [block(*target_size) for _ in range(blocks)]
        targets.append([places for places, _ in drawn])
        contexts.append(block(*context_size, kept_out=[complement for _, complement in drawn])[0])
    shortest = min(len(kept) for kept in contexts)
    context = torch.stack([kept[:shortest] for kept in contexts])
    return context, torch.stack([torch.stack(each) for each in zip(*targets, strict=True)])
