"""Masks of few shapes, for what must know all shapes beforehand: the same tokens, with rows behind them.

What a CUDA graph was captured for, it can do again only for the same shapes. In 600 steps of `truncate` at
B/16, 128 images each, (K, P) has 72 values, and with the number of asked rows there are 592 shapes; in
`packed` nearly every step has its own. Here the context becomes a packed stream with rows past its end up to
the next step of a coarse scale, where no sequence sees them and no gradient reaches them. Of those 600 steps
15 shapes are left in `truncate` and 28 in `packed`; at H/14 with 64 images, 27 and 49.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from fastjepa.masks.types import Masks

CONTEXT_STEP = 8  # tokens of an image: a batch of equal contexts is as if each had up to 7 more
STREAM_STEP = 4  # tokens of an image on average, of a packed stream
ASKED_STEP = 16  # the same of the rows that the target blocks name


def in_buckets(masks: Masks) -> Masks:
    """The same masks in one of few shapes, contexts packed. On any device, without asking for a value."""
    _, batch, _ = masks.targets.shape
    rows = masks.asked_rows
    if rows is not None:  # the first row once more does not matter to a pass without gradient
        rows = _padded(rows, batch * ASKED_STEP)
    if masks.cu_seqlens is not None:
        context = _padded(masks.context, batch * STREAM_STEP)
        return Masks(context, masks.targets, masks.cu_seqlens, rows, masks.asked_places, masks.longest)
    kept = masks.context.shape[1]
    starts = torch.arange(batch + 1, dtype=torch.int32, device=masks.context.device) * kept
    context = _padded(masks.context.flatten(), batch * CONTEXT_STEP)
    longest = _round_up(kept, CONTEXT_STEP)
    return Masks(context, masks.targets, starts, rows, masks.asked_places, longest)


def _round_up(count: int, step: int) -> int:
    return -(-count // step) * step


def _padded(index: Tensor, step: int) -> Tensor:
    """Up to a multiple of `step`, with zeros."""
    return F.pad(index, (0, _round_up(len(index), step) - len(index)))
