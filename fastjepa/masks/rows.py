"""Which tokens of the target encoder anybody asks for."""

import numpy as np
import torch
from torch import Tensor


def asked_rows(targets: Tensor, patches: int, fixed: bool) -> tuple[Tensor, Tensor]:
    """The rows that the target blocks name, in the stream of all images' patches.

    In NumPy, which has no threads: masks are drawn in forked processes, where those of torch may be missing.

    Args:
        targets: int64 [M, B, P] on the CPU, where counting waits for nothing.
        patches: N of each image.
        fixed: as many rows in every batch: one for each target token, whether blocks overlap or not.

    Returns:
        rows int64 [R], and for each target token its place among them, int64 [M, B, P].
    """
    blocks, batch, asked = targets.shape
    stream = np.arange(batch)[:, None] * patches + targets.numpy()  # [M, B, P]
    if fixed:
        places = np.arange(stream.size).reshape(stream.shape)
        return torch.from_numpy(stream.reshape(-1)), torch.from_numpy(places)
    is_asked = np.zeros(batch * patches, dtype=bool)
    is_asked[stream] = True
    place = is_asked.cumsum() - 1  # [B * N]
    return torch.from_numpy(np.flatnonzero(is_asked)), torch.from_numpy(place[stream])
