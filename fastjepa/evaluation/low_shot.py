"""Few labels: a linear classifier on a draw of the labels of every class, over several draws."""

import torch
from torch import Tensor

from fastjepa.evaluation.linear import linear_correct


def low_shot_correct(
    train: Tensor,
    train_labels: Tensor,
    test: Tensor,
    test_labels: Tensor,
    fraction: float,
    splits: int,
    seed: int = 0,
) -> tuple[Tensor, tuple[float, ...]]:
    """Logistic regression on a part of the labels, once for each draw of them.

    The protocol of 1 % of ImageNet's labels without fine-tuning (MSN, arXiv:2204.07141), with the strength
    chosen as `linear_correct` does, on a fifth of the few labels there are.

    Args:
        train: [n, D] features, of which a draw takes `fraction` of every class, at least one.
        train_labels: int64 [n].
        test: [m, D], on the same device.
        test_labels: int64 [m].
        fraction: above 0 and below 1.
        splits: how many draws; draw i is of seed + i.
        seed: of the first draw.

    Returns:
        bool [splits, m], which test rows are right, and the strength of each draw.

    Raises:
        ValueError: as `linear_correct`; a draw needs at least 5 rows.
    """
    found, strengths = [], []
    for number in range(splits):
        rows, _ = split_of_classes(train_labels, fraction, seed + number)
        right, l2 = linear_correct(train[rows], train_labels[rows], test, test_labels, seed + number)
        found.append(right)
        strengths.append(l2)
    return torch.stack(found), tuple(strengths)


def split_of_classes(labels: Tensor, fraction: float, seed: int) -> tuple[Tensor, Tensor]:
    """Rows drawn at random from every class, and the others, each in ascending order.

    Of a class of n rows, round(fraction * n) are drawn, at least one and never the last.

    Args:
        labels: int64 [n].
        fraction: of each class, above 0 and below 1.

    Returns:
        int64 rows, drawn and left, on the device of `labels`.
    """
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(labels), generator=generator)
    here = labels.cpu()[order]
    drawn = torch.zeros(len(labels), dtype=torch.bool)
    for label in here.unique():
        rows = order[here == label]
        count = min(max(1, round(fraction * len(rows))), len(rows) - 1)
        drawn[rows[:count]] = True
    drawn = drawn.to(labels.device)
    return drawn.nonzero()[:, 0], (~drawn).nonzero()[:, 0]
