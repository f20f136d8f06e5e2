"""How a packed stream of tokens x[T, D] is cut into sequences."""

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor
from torch._guards import detect_fake_mode


@dataclass(frozen=True)
class Sequences:
    """Sequence s is the rows cu_seqlens[s] to cu_seqlens[s + 1] of the stream."""

    cu_seqlens: Tensor  # int32 [S + 1]
    max_seqlen: int  # an upper bound, known without asking the device
    equal: bool = False  # all are of max_seqlen tokens and fill the stream, so dense kernels may serve

    @property
    def count(self) -> int:
        return self.cu_seqlens.numel() - 1


def may_be_kept() -> bool:
    """Whether a tensor made now is good for later calls: not a compiler's, which traces, nor a fake one."""
    return not torch.compiler.is_compiling() and detect_fake_mode() is None


def equal_sequences(count: int, length: int, device: torch.device) -> Sequences:
    """`count` sequences of `length` tokens each. Made once for each size, and kept."""
    make = _kept_equal_sequences if may_be_kept() else _kept_equal_sequences.__wrapped__
    return make(count, length, device)


@lru_cache(maxsize=256)
def _kept_equal_sequences(count: int, length: int, device: torch.device) -> Sequences:
    # A cached tensor may be asked for inside and outside inference mode; it must serve both.
    with torch.inference_mode(False):
        starts = torch.arange(count + 1, dtype=torch.int32, device=device) * length
    return Sequences(starts, length, equal=True)
