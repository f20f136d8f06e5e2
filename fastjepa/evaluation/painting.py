"""What a masked autoencoder paints where it does not see."""

import torch
import torch.nn.functional as F
from torch import Tensor

from fastjepa.evaluation.bank import Bank
from fastjepa.evaluation.patchwork import cut, fill, join, shrink
from fastjepa.evaluation.retrieval import side_of
from fastjepa.evaluation.showing import Painted

_FLAT = 1.0  # grey levels: a patch that departs less from its mean shows nothing to be right about


@torch.no_grad()
def paint(
    images: Tensor,
    prediction: Tensor,
    hidden: Tensor,
    bank: Bank,
    patch: int,
    pixel_mean: Tensor,
    pixel_std: Tensor,
    normalised_with: float | None,
) -> Painted:
    """Pictures of what a decoder says of hidden patches, and how well it agrees with them.

    A decoder trained on pixels that are normalised patch by patch says nothing of a patch's mean and
    contrast. They are taken from the true patch, and `given` shows what that alone gives away.

    Args:
        images: uint8 [n, C, H, W], on the host, none of which is in the bank.
        prediction: [n, N, p p C], the channel changing fastest.
        hidden: int64 [n, P], the patches that the encoder did not see.
        bank: of images; their tokens play no part.
        patch: pixels of a patch's side.
        pixel_mean, pixel_std: fp32 [C], by which pixels were normalised, in 0 to 1.
        normalised_with: what was added to a patch's variance, or None where pixels were not normalised.
    """
    grid = images.shape[2] // patch, images.shape[3] // patch
    prediction, hidden = prediction.float().cpu(), hidden.cpu()
    at = torch.arange(len(images))[:, None]  # [n, 1]
    said = prediction.unflatten(2, (patch, patch, -1)).movedim(-1, 2)[at, hidden]  # [n, P, C, p, p]
    scale, shift = 255 * pixel_std[:, None, None], 255 * pixel_mean[:, None, None]  # to grey levels
    cells = cut(images, patch)  # uint8 [n, N, C, p, p]
    true = (cells[at, hidden].float() - shift) / scale  # [n, P, C, p, p]
    if normalised_with is None:
        seen = torch.ones(cells.shape[:2], dtype=torch.bool)
        seen[at, hidden] = False
        weight = seen[:, :, None, None, None] / seen.sum(dim=1)[:, None, None, None, None]
        colour = (cells.float().mean(dim=(3, 4), keepdim=True) * weight).sum(dim=1, keepdim=True)
        given = colour.expand_as(true)  # [n, P, C, p, p], in grey levels
    else:
        variance, mean = torch.var_mean(true, dim=(2, 3, 4), keepdim=True)  # as the loss has them
        said = said * (variance + normalised_with).sqrt() + mean
        given = mean * scale + shift + torch.zeros_like(true)
    painted = said * scale + shift  # [n, P, C, p, p]

    side = side_of(patch, grid)
    small = shrink(cells, side)
    pictures = [
        join(fill(small, hidden[None], shrink(levels.round().clamp(0, 255).byte(), side)[None]), grid)
        for levels in (painted, given)
    ]
    typical = _mean_patches(bank.images, patch)[hidden]  # [n, P, C, p, p]
    return Painted(
        painted=pictures[0],
        given=pictures[1],
        is_normalised=torch.tensor(normalised_with is not None),
        correlation=correlation(painted, true * scale).half(),
        of_mean=correlation(typical, true * scale).half(),
    )


def correlation(one: Tensor, other: Tensor) -> Tensor:
    """Pearson's, of the pixels of patches in grey levels [n, P, C, p, p]: [n, P].

    nan where the other patch is flat; 0 where the one is, which then says nothing.
    """
    one, other = (x.flatten(2) - x.flatten(2).mean(dim=2, keepdim=True) for x in (one, other))
    is_flat = other.pow(2).mean(dim=2).sqrt() < _FLAT
    return torch.where(is_flat, torch.nan, F.cosine_similarity(one, other, dim=2))


def _mean_patches(images: Tensor, patch: int) -> Tensor:
    """The mean patch of each place, [N, C, p, p], in grey levels: no image is in fp32 but a few."""
    total = sum(part.double().sum(dim=0) for part in images.split(32))
    assert isinstance(total, Tensor), "a bank has images"
    return cut((total / len(images)).float()[None], patch)[0]
