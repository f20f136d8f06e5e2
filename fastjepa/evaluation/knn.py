"""Weighted k-nearest-neighbour classification: what the features tell with nothing trained on them."""

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

_NORMALISED_AT_ONCE = 1 << 22  # of float64: 32 MiB
_SIMILARITIES_AT_ONCE = 1 << 26  # of fp32: 256 MiB


def knn_accuracy(
    bank: Tensor,
    bank_labels: Tensor,
    queries: Tensor,
    query_labels: Tensor,
    k: int = 20,
    temperature: float = 0.07,
) -> float:
    """The fraction of queries that `knn_correct` finds right, in [0, 1]; arguments as there."""
    right = knn_correct(bank, bank_labels, queries, query_labels, (k,), temperature)[0]
    return int(right.sum()) / len(queries)


@torch.no_grad()
def knn_correct(
    bank: Tensor,
    bank_labels: Tensor,
    queries: Tensor,
    query_labels: Tensor,
    ks: Sequence[int] = (10, 20, 100),
    temperature: float = 0.07,
) -> Tensor:
    """Whether the k nearest neighbours of each query in the bank vote for the right label.

    Nearness is cosine similarity, and a neighbour of similarity s votes with the weight
    exp(s / temperature) (Wu et al., "Unsupervised feature learning via non-parametric instance
    discrimination", CVPR 2018, as in DINO, arXiv:2104.14294).

    Args:
        bank: [n, D] features with known labels.
        bank_labels: int64 [n], from 0.
        queries: [m, D] features on the same device.
        query_labels: int64 [m].
        ks: how many neighbours vote, each 1..n; the neighbours are sought once for all of them.
        temperature: above 0; the smaller, the more the nearest outweigh the others.

    Returns:
        bool [len(ks), m].

    Raises:
        ValueError: a k or the temperature is out of range, the shapes do not fit, or a feature is not finite.
    """
    for k in ks:
        if not 1 <= k <= len(bank):
            raise ValueError(
                f"k is {k}, but the bank holds {len(bank)} features: give a k of 1 to {len(bank)}"
            )
    if temperature <= 0:
        raise ValueError(f"temperature is {temperature}; it must be above 0 (0.07 is the usual choice)")
    if len(bank) != len(bank_labels) or len(queries) != len(query_labels) or len(queries) == 0:
        raise ValueError(
            f"{len(bank)} bank features with {len(bank_labels)} labels and {len(queries)} queries "
            f"with {len(query_labels)} labels: every feature needs one label, and there must be a query"
        )
    if not (bank.isfinite().all() and queries.isfinite().all()):
        raise ValueError("the features are not all finite: the encoder has diverged, or its input was bad")
    # Where all features have much in common, 32 bits of a cosine near 1 tell nothing. With b = c + b' and
    # q = c + q' it is q' b' + c b', and what a query adds to all of its cosines alike, which is left out.
    common = torch.stack([unit.sum(dim=0) for unit in _of_unit_length(bank)]).sum(dim=0) / len(bank)  # [D]
    offset = torch.cat([(unit - common) @ common for unit in _of_unit_length(bank)]).float()  # [n]
    bank, queries = (
        torch.cat([(unit - common).float() for unit in _of_unit_length(z)]) for z in (bank, queries)
    )  # [n, D], [m, D]
    classes = int(bank_labels.max()) + 1
    right = torch.empty(len(ks), len(queries), dtype=torch.bool, device=queries.device)
    chunk = max(1, _SIMILARITIES_AT_ONCE // len(bank))
    for found, some, wanted in zip(
        right.split(chunk, dim=1), queries.split(chunk), query_labels.split(chunk), strict=True
    ):
        similarity, nearest = torch.addmm(offset, some, bank.T).topk(max(ks))  # [b, k], descending
        # Only the ratio of weights counts; from the nearest on down, exp cannot overflow. In 64 bits, for
        # weights close to 1 would become equal, and the lower label would win.
        weight = torch.exp((similarity - similarity[:, :1]).double() / temperature)
        labels = bank_labels[nearest]  # [b, k]
        for row, k in zip(found, ks, strict=True):
            votes = weight.new_zeros(len(some), classes)  # [b, classes]
            votes.scatter_add_(1, labels[:, :k], weight[:, :k])
            row.copy_(votes.argmax(dim=1) == wanted)
    return right


def _of_unit_length(z: Tensor) -> Iterator[Tensor]:
    """Rows in 64 bits, a few at a time: all at once would take twice the memory of the features."""
    for some in z.split(max(1, _NORMALISED_AT_ONCE // z.shape[1])):
        yield F.normalize(some.double(), dim=1)
