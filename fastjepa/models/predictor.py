"""The predictor: from context tokens and the positions asked for to representations."""

import torch
from torch import Tensor, nn

from fastjepa.models.block import NORM_EPS, Block
from fastjepa.models.positions import sincos_2d
from fastjepa.models.sequences import Sequences, equal_sequences
from fastjepa.models.vit import run_blocks
from fastjepa_kernels.checks import require, require_index, require_index_values, shape_of


class Predictor(nn.Module):
    """A narrow ViT over [context; mask tokens] for each of M target blocks (arXiv:2301.08243).

    Args:
        grid: patches per column and row.
        encoder_width: D, of the tokens that come in and of the predictions.
        width, depth, heads: of the predictor itself.
    """

    predictor_pos_embed: Tensor  # [1, N, width]

    def __init__(self, grid: tuple[int, int], encoder_width: int, width: int, depth: int, heads: int) -> None:
        super().__init__()
        self.checkpoint_blocks = False
        self.predictor_embed = nn.Linear(encoder_width, width)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width))
        self.register_buffer("predictor_pos_embed", sincos_2d(grid, width))
        self.predictor_blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.predictor_norm = nn.LayerNorm(width, eps=NORM_EPS)
        self.predictor_proj = nn.Linear(width, encoder_width)

    def forward(
        self, context: Tensor, context_index: Tensor, target_index: Tensor, cu_seqlens: Tensor | None = None
    ) -> Tensor:
        """Predict the representations at `target_index`.

        Args:
            context: encoder output, [B, K, D], or packed [T, D].
            context_index: [B, K] or packed [T].
            target_index: [M, B, P].
            cu_seqlens: int32 [B + 1] if packed.

        Returns:
            [M, B, P, D].

        Raises:
            ValueError: target_index has another shape; on the CPU also if a position is not in the grid.
        """
        positions = self.predictor_pos_embed[0].to(context.dtype)  # [N, d]
        batch = context.shape[0] if cu_seqlens is None else cu_seqlens.numel() - 1
        require(
            target_index.ndim == 3 and target_index.shape[1] == batch,
            lambda: f"target_index must be [M, B, P] with B = {batch}, got {shape_of(target_index)}",
        )
        require_index("target_index", target_index)
        require_index_values("target_index", target_index, positions.shape[0])
        seen = self.predictor_embed(context) + positions[context_index.long()]  # [B, K, d] or [T, d]
        asked = self.mask_token[0] + positions[target_index.long()]  # [M, B, P, d]
        if cu_seqlens is None:
            x, sequences = _join_dense(seen, asked)
            x = run_blocks(self.predictor_blocks, x, sequences, self.checkpoint_blocks)
            x = x.view(sequences.count, sequences.max_seqlen, x.shape[1])[:, seen.shape[1] :]
        else:
            x, sequences, rows = _join_packed(seen, asked, cu_seqlens, positions.shape[0])
            x = run_blocks(self.predictor_blocks, x, sequences, self.checkpoint_blocks)[rows]
        return self.predictor_proj(self.predictor_norm(x)).view(*asked.shape[:3], context.shape[-1])


def _join_dense(seen: Tensor, asked: Tensor) -> tuple[Tensor, Sequences]:
    """[context; block] for each (block, image): the stream and its cut."""
    x = torch.cat([seen.expand(asked.shape[0], -1, -1, -1), asked], dim=2).flatten(0, 1)  # [M B, K + P, d]
    return x.flatten(0, 1), equal_sequences(x.shape[0], x.shape[1], x.device)


def _join_packed(
    seen: Tensor, asked: Tensor, cu_seqlens: Tensor, grid_patches: int
) -> tuple[Tensor, Sequences, Tensor]:
    """The same for contexts of unequal length: the stream, its cut, and the rows of the blocks.

    Every shape is known on the host: M * (T + B * P) tokens. Context rows past cu_seqlens[-1] go behind
    everything, where no sequence sees them.
    """
    blocks, batch, patches, _ = asked.shape
    device, tokens = seen.device, seen.shape[0]
    starts = cu_seqlens.long()  # [B + 1]
    end = starts[-1]  # 0-d, on the device
    per_block = end + batch * patches
    block = torch.arange(blocks, device=device)[:, None]  # [M, 1]
    offset = block * per_block  # [M, 1]

    # Image b's context rows move down by the P rows of each block before it.
    row = torch.arange(tokens, device=device)  # [T]
    image = torch.searchsorted(starts, row, right=True) - 1  # [T]
    behind = blocks * per_block + block * (tokens - end) + row - end  # [M, T]
    seen_rows = torch.where(row < end, offset + row + image * patches, behind)  # [M, T]
    first = starts[1:] + torch.arange(batch, device=device) * patches  # [B], where b's block starts
    asked_rows = offset[:, :, None] + first[:, None] + torch.arange(patches, device=device)  # [M, B, P]
    rows = asked_rows.flatten()

    order = torch.empty(blocks * (tokens + batch * patches), dtype=torch.long, device=device)
    order[seen_rows.flatten()] = row.repeat(blocks)
    order[rows] = torch.arange(tokens, tokens + rows.numel(), device=device)
    x = torch.cat([seen, asked.flatten(0, 2)]).index_select(0, order)  # [M (T + B P), d]

    block_starts = starts[:-1] + torch.arange(batch, device=device) * patches  # [B]
    cuts = torch.cat([(offset + block_starts).flatten(), (blocks * per_block)[None]])  # [M B + 1]
    return x, Sequences(cuts.int(), grid_patches + patches), rows
