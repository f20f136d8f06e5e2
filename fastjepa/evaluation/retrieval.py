"""What a prediction is near to: the target it was made for, the patches and the images of a bank."""

import torch
import torch.nn.functional as F
from torch import Tensor

from fastjepa.evaluation.bank import Bank
from fastjepa.evaluation.features import standardise
from fastjepa.evaluation.nearest import nearest_rows
from fastjepa.evaluation.patchwork import cut, fill, join, shrink, surroundings
from fastjepa.evaluation.showing import Neighbours, Predictions, Retrieved

SIDE = 8  # pixels of a patch in a picture of a whole image, or fewer where there are many patches
MOST_ACROSS = 128  # pixels of such a picture
_EXAMPLE_IMAGES = 2
_NEAREST_PATCHES = 3
_EXAMPLE_SIDE = 48  # pixels of a patch amid its surroundings
_NEAREST_IMAGES = 4
_THUMBNAIL = 64  # pixels of an image that is a neighbour
_PIXEL_SIZE = 32  # of raw pixels as features, as where they are a baseline


@torch.no_grad()
def compare(prediction: Tensor, tokens: Tensor, targets: Tensor, mean: Tensor) -> Predictions:
    """How near predictions are to their targets, patch by patch.

    Args:
        prediction: [M, n, P, D].
        tokens: [n, N, D], layer-normed target tokens of all places, on the same device.
        targets: int64 [M, n, P].
        mean: [N, D], the mean target of each place.
    """
    image = torch.arange(len(tokens), device=tokens.device)[:, None]  # [n, 1]
    target, typical = tokens[image, targets].float(), mean.float()[targets]  # [M, n, P, D] each
    departure = prediction.float() - typical  # [M, n, P, D]
    own = F.cosine_similarity(departure, target - typical, dim=-1)  # [M, n, P]
    everyone = torch.zeros_like(own)
    for other in tokens.float():  # [N, D]
        everyone += F.cosine_similarity(departure, other[targets] - typical, dim=-1)
    return Predictions(
        cosine=F.cosine_similarity(prediction.float(), target, dim=-1).half(),
        of_mean=F.cosine_similarity(typical, target, dim=-1).half(),
        centred=own.half(),
        of_others=((everyone - own) / max(1, len(tokens) - 1)).half(),
    )


@torch.no_grad()
def retrieve(
    images: Tensor, prediction: Tensor, tokens: Tensor, targets: Tensor, bank: Bank, patch: int
) -> Retrieved:
    """Pixels of the bank's patches that are nearest to predictions, to true targets, and to the mean target.

    Args:
        images: uint8 [n, C, H, W], none of which is in the bank.
        prediction, tokens, targets: as of `compare`.
        bank: with layer-normed target tokens, on the same device.
        patch: pixels of a patch's side.
    """
    n, channels, height, width = images.shape
    grid, dim = (height // patch, width // patch), tokens.shape[-1]
    at = torch.arange(n, device=tokens.device)[:, None]
    mean = bank.mean_tokens()  # [N, D]
    asked = torch.stack([prediction.float(), tokens[at, targets].float(), mean[targets]])  # [3, M, n, P, D]
    rows = bank.tokens.flatten(0, 1)  # [b N, D]
    k = min(_NEAREST_PATCHES, len(rows))
    found = nearest_rows(asked.view(-1, dim), rows, k, mean.mean(dim=0)).view(*asked.shape[:-1], k).cpu()

    targets = targets.cpu()
    side = side_of(patch, grid)
    hidden = shrink(cut(images, patch), side)  # [n, N, C, s, s]
    patches = shrink(cut(bank.images, patch), side).flatten(0, 1)  # [b N, C, s, s]
    by_prediction, by_target, by_mean = (
        join(fill(hidden, targets, patches[best[..., 0]]), grid) for best in found
    )

    examples, example_image, example_block, example_place = [], [], [], []
    for image in (torch.arange(min(_EXAMPLE_IMAGES, n)) * n // min(_EXAMPLE_IMAGES, n)).tolist():
        for block in range(len(targets)):
            middle = targets.shape[2] // 2  # whatever has been found there
            place = int(targets[block, image, middle])
            near = found[:2, block, image, middle].flatten().tolist()  # [2 k]
            there = [divmod(row, tokens.shape[1]) for row in near]
            cells = [surroundings(images[image], place, patch)]
            cells += [surroundings(bank.images[number], where, patch) for number, where in there]
            examples.append(shrink(torch.stack(cells), _EXAMPLE_SIDE))
            example_image.append(image)
            example_block.append(block)
            example_place.append(place)
    return Retrieved(
        by_prediction,
        by_target,
        by_mean,
        example_image=torch.tensor(example_image),
        example_block=torch.tensor(example_block),
        example_place=torch.tensor(example_place),
        examples=torch.stack(examples),
    )


def side_of(patch: int, grid: tuple[int, int]) -> int:
    """Pixels of a patch in a picture of a whole image: no more than it has, nor than there is room for."""
    return max(1, min(patch, SIDE, MOST_ACROSS // max(grid)))


@torch.no_grad()
def neighbours(images: Tensor, pooled: Tensor, labels: Tensor | None, bank: Bank) -> Neighbours:
    """The nearest images of the bank, both by features and by pixels standardised over the bank, by cosine.

    Args:
        images: uint8 [n, C, H, W], none of which is in the bank.
        pooled: [n, D], the mean of the tokens of each.
        labels: int64 [n].
    """
    k = min(_NEAREST_IMAGES, len(bank.images))
    reference, queries = standardise(bank.pooled(), pooled.float())
    by_features = nearest_rows(queries, reference, k).cpu()  # [n, k]
    pixels = [shrink(some, _PIXEL_SIZE).flatten(1).float() for some in (bank.images, images)]
    reference, queries = standardise(*pixels)
    by_pixels = nearest_rows(queries, reference, k)  # [n, k]
    has_labels = labels is not None and bank.labels is not None
    bank_labels = (
        bank.labels if has_labels and bank.labels is not None else torch.full((len(bank.images),), -1)
    )
    return Neighbours(
        by_features=shrink(bank.images[by_features], _THUMBNAIL),
        by_pixels=shrink(bank.images[by_pixels], _THUMBNAIL),
        feature_labels=bank_labels[by_features],
        pixel_labels=bank_labels[by_pixels],
        labels=labels if has_labels and labels is not None else torch.full((len(images),), -1),
        bank_labels=bank_labels,
    )
