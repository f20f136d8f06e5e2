"""The nearest rows of a bank, by cosine."""

import torch
import torch.nn.functional as F
from torch import Tensor

_SIMILARITIES_AT_ONCE = 1 << 24  # of fp32: 64 MiB


def nearest_rows(queries: Tensor, bank: Tensor, k: int, centre: Tensor | float = 0.0) -> Tensor:
    """For each query the k rows of the bank with the largest cosine, nearest first.

    The bank is gone through in parts, and is in fp32 only part by part.

    Args:
        queries: [q, D], any float type.
        bank: [r, D], on the same device.
        k: 1 to r.
        centre: [D], taken off queries and bank first.

    Returns:
        int64 [q, k].

    Raises:
        ValueError: k is out of range.
    """
    if not 1 <= k <= len(bank):
        raise ValueError(f"k is {k}, but the bank holds {len(bank)} rows: give a k of 1 to {len(bank)}")
    queries = F.normalize(queries.float() - centre, dim=1)  # [q, D]
    similarity = queries.new_empty(len(queries), 0)
    rows = torch.empty(len(queries), 0, dtype=torch.int64, device=queries.device)
    first = 0
    for part in bank.split(max(k, _SIMILARITIES_AT_ONCE // max(1, len(queries)))):
        found = queries @ F.normalize(part.float() - centre, dim=1).T  # [q, c]
        value, row = found.topk(min(k, len(part)))
        similarity = torch.cat([similarity, value], dim=1)
        rows = torch.cat([rows, row + first], dim=1)
        similarity, kept = similarity.topk(min(k, similarity.shape[1]))
        rows = rows.gather(1, kept)
        first += len(part)
    return rows
