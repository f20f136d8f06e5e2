"""How the predictor's tokens lie: each once, and in the stream of [context; block]."""

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from fastjepa.models.sequences import Sequences, equal_sequences, may_be_kept


@dataclass(frozen=True)
class Layout:
    """Where each token goes when each of M blocks of each image gets the image's context before it.

    Tokens come once: the context's T rows, image by image, then the M * B * P rows asked for. In the stream
    of M * (T + B * P) rows every block has a copy of its image's context.

    Attributes:
        sequences: of the stream; M * B of them, in the order of the blocks.
        asked_rows: int64 [M * B * P], where the rows asked for are in the stream.
        blocks: M.
        seen: T.
        shape: (M, B, K, P) if all contexts have K tokens, else None.
        order: int64, of each row of the stream the token it holds; None with a shape.
        seen_rows: int64 [M, T], where the context's copies are; None with a shape.
    """

    sequences: Sequences
    asked_rows: Tensor
    blocks: int
    seen: int
    shape: tuple[int, int, int, int] | None = None
    order: Tensor | None = None
    seen_rows: Tensor | None = None

    def spread(self, tokens: Tensor) -> Tensor:
        """Tokens [T + M * B * P, W] as the stream [M * (T + B * P), W]; the gradient of copies is summed."""
        out: Tensor = _Spread.apply(tokens, self)
        return out


class _Spread(torch.autograd.Function):
    """The copies' gradients are summed in one order, where index_select's own backward pass has atomics."""

    @staticmethod
    def forward(ctx: Any, tokens: Tensor, layout: Layout) -> Tensor:
        ctx.layout = layout
        if layout.order is not None:
            return tokens.index_select(0, layout.order)
        assert layout.shape is not None, "a layout has a shape or an order"
        blocks, batch, kept, asked = layout.shape
        width = tokens.shape[1]
        out = tokens.new_empty(blocks, batch, kept + asked, width)
        out[:, :, :kept] = tokens[: layout.seen].view(1, batch, kept, width)
        out[:, :, kept:] = tokens[layout.seen :].view(blocks, batch, asked, width)
        return out.view(-1, width)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        layout: Layout = ctx.layout
        width = grad.shape[1]
        out = grad.new_empty(layout.seen + layout.asked_rows.numel(), width)
        if layout.seen_rows is not None:
            copies = grad.index_select(0, layout.seen_rows.flatten())  # [M * T, W]
            torch.sum(copies.view(layout.blocks, layout.seen, width), dim=0, out=out[: layout.seen])
            torch.index_select(grad, 0, layout.asked_rows, out=out[layout.seen :])
            return out, None
        assert layout.shape is not None, "a layout has a shape or an order"
        blocks, batch, kept, asked = layout.shape
        stream = grad.view(blocks, batch, kept + asked, width)
        torch.sum(stream[:, :, :kept], dim=0, out=out[: layout.seen].view(batch, kept, width))
        out[layout.seen :].view(blocks, batch, asked, width).copy_(stream[:, :, kept:])
        return out, None


def dense_layout(blocks: int, batch: int, kept: int, asked: int, device: torch.device) -> Layout:
    """Of contexts of K tokens each. Made once for each size, and kept."""
    make = _kept_dense_layout if may_be_kept() else _kept_dense_layout.__wrapped__
    return make(blocks, batch, kept, asked, device)


@lru_cache(maxsize=256)
def _kept_dense_layout(blocks: int, batch: int, kept: int, asked: int, device: torch.device) -> Layout:
    # A cached tensor may be asked for inside and outside inference mode; it must serve both.
    with torch.inference_mode(False):
        starts = torch.arange(blocks * batch, device=device)[:, None] * (kept + asked)
        rows = (starts + kept + torch.arange(asked, device=device)).flatten()
    sequences = equal_sequences(blocks * batch, kept + asked, device)
    return Layout(sequences, rows, blocks, batch * kept, shape=(blocks, batch, kept, asked))


def packed_layout(cu_seqlens: Tensor, seen: int, blocks: int, asked: int, longest: int) -> Layout:
    """Of contexts of unequal length. Every shape is known on the host.

    Context rows past cu_seqlens[-1] go behind everything, where no sequence sees them.

    Args:
        cu_seqlens: int32 [B + 1], of the context.
        seen: T, its rows.
        blocks, asked: M and P.
        longest: a bound of the contexts' lengths.
    """
    device, batch = cu_seqlens.device, cu_seqlens.numel() - 1
    starts = cu_seqlens.long()  # [B + 1]
    end = starts[-1]  # 0-d, on the device
    per_block = end + batch * asked
    block = torch.arange(blocks, device=device)[:, None]  # [M, 1]
    offset = block * per_block  # [M, 1]

    # Image b's context rows move down by the P rows of each block before it.
    row = torch.arange(seen, device=device)  # [T]
    image = torch.searchsorted(starts, row, right=True) - 1  # [T]
    behind = blocks * per_block + block * (seen - end) + row - end  # [M, T]
    seen_rows = torch.where(row < end, offset + row + image * asked, behind)  # [M, T]
    first = starts[1:] + torch.arange(batch, device=device) * asked  # [B], where b's block starts
    asked_rows = (offset[:, :, None] + first[:, None] + torch.arange(asked, device=device)).flatten()  # [MBP]

    order = torch.empty(blocks * (seen + batch * asked), dtype=torch.long, device=device)
    order[seen_rows.flatten()] = row.repeat(blocks)
    order[asked_rows] = torch.arange(seen, seen + asked_rows.numel(), device=device)

    block_starts = starts[:-1] + torch.arange(batch, device=device) * asked  # [B]
    cuts = torch.cat([(offset + block_starts).flatten(), (blocks * per_block)[None]])  # [M B + 1]
    sequences = Sequences(cuts.int(), longest + asked)
    return Layout(sequences, asked_rows, blocks, seen, order=order, seen_rows=seen_rows)
