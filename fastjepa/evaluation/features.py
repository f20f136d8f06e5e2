"""From images to one feature vector per image, which is what the probes compare."""

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor


@torch.no_grad()  # not inference_mode: the linear probe differentiates through its features
def pool_features(
    encode: Callable[[Tensor], Tensor],
    batches: Iterable[tuple[Tensor, Tensor]],
    device: torch.device | str,
) -> tuple[Tensor, Tensor]:
    """The mean over the tokens of every image.

    Args:
        encode: uint8 images [B, C, H, W] on `device` -> token features [B, N, D], any float type.
        batches: pairs of uint8 images [B, C, H, W] and labels [B].
        device: where `encode` runs and where the results stay.

    Returns:
        Features, fp32 [n, D], and labels, int64 [n].

    Raises:
        ValueError: there is no batch, or `encode` does not return [B, N, D].
    """
    features, labels = [], []
    for images, batch_labels in batches:
        features.append(mean_of_tokens([encode(images.to(device, non_blocking=True))], len(images)))
        labels.append(batch_labels.to(device, torch.int64))
    if not features:
        raise ValueError("there is no batch to take features of: the set is empty")
    return torch.cat(features), torch.cat(labels)


def mean_of_tokens(blocks: Sequence[Tensor], images: int) -> Tensor:
    """The mean over the tokens of each block, side by side: fp32 [B, blocks * D].

    Args:
        blocks: [B, N, D] each, any float type.
        images: B.

    Raises:
        ValueError: a block is not [B, N, D].
    """
    for tokens in blocks:
        if tokens.ndim != 3 or len(tokens) != images:
            raise ValueError(
                f"encode returned {list(tokens.shape)} for {images} images; "
                f"expected token features [{images}, tokens, width]"
            )
    return torch.cat([tokens.float().mean(dim=1) for tokens in blocks], dim=1)


def pixel_features(batches: Iterable[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """The pixels themselves, in [0, 1]: the baseline an encoder has to beat.

    Args:
        batches: pairs of uint8 images [B, C, H, W] and labels [B].

    Returns:
        Features, fp32 [n, C*H*W], and labels, int64 [n], where the images were.

    Raises:
        ValueError: there is no batch.
    """
    features, labels = [], []
    for images, batch_labels in batches:
        features.append(images.flatten(1).float() / 255)  # [B, C*H*W]
        labels.append(batch_labels.to(torch.int64))
    if not features:
        raise ValueError("there is no batch to take pixels of: the set is empty")
    return torch.cat(features), torch.cat(labels)


def standardise(train: Tensor, test: Tensor) -> tuple[Tensor, Tensor]:
    """Both with the mean of the training rows taken off and divided by their deviation, per dimension.

    Args:
        train: [n, D].
        test: [m, D].
    """
    deviation, mean = torch.std_mean(train, dim=0)  # [D] each
    # A column constant up to rounding (a border pixel, a collapsed dimension) tells nothing;
    # divided by its own deviation it would come back as noise of full size.
    scale = torch.where(deviation > 1e-6 * mean.abs(), deviation, torch.inf)
    return (train - mean) / scale, (test - mean) / scale
