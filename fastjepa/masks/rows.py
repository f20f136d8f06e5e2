"""Which tokens of the target encoder anybody asks for."""

import torch
from torch import Tensor


def asked_rows(targets: Tensor, patches: int, fixed: bool) -> tuple[Tensor, Tensor]:
    """The rows that the target blocks name, in the stream of all images' patches.

    Args:
        targets: int64 [M, B, P] on the CPU, where counting waits for nothing.
        patches: N of each image.
        fixed: as many rows in every batch: one for each target token, whether blocks overlap or not.

    Returns:
        rows int64 [R], and for each target token its place among them, int64 [M, B, P].
    """
    blocks, batch, asked = targets.shape
    stream = torch.arange(batch)[:, None] * patches + targets  # [M, B, P]
    if fixed:
        return stream.flatten(), torch.arange(stream.numel()).view(stream.shape)
    is_asked = torch.zeros(batch * patches, dtype=torch.bool)
    is_asked[stream.flatten()] = True
    place = is_asked.cumsum(0) - 1  # [B * N]
    return is_asked.nonzero().flatten(), place[stream]
