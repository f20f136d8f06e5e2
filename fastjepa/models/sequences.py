"""How a packed stream of tokens x[T, D] is cut into sequences."""

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor


@dataclass(frozen=True)
class Sequences:
    """Sequence s is the rows cu_seqlens[s] to cu_seqlens[s + 1] of the stream."""

    cu_seqlens: Tensor  # int32 [S + 1]
    max_seqlen: int  # an upper bound, known without asking the device
    equal: bool = False  # all are of max_seqlen tokens and fill the stream, so dense kernels may serve

    @property
    def count(self) -> int:
        return self.cu_seqlens.numel() - 1


@lru_cache(maxsize=256)
def equal_sequences(count: int, length: int, device: torch.device) -> Sequences:
    """`count` sequences of `length` tokens each."""
    # A cached tensor may be asked for inside and outside inference mode; it must serve both.
    with torch.inference_mode(False):
        starts = torch.arange(count + 1, dtype=torch.int32, device=device) * length
    return Sequences(starts, length, equal=True)
