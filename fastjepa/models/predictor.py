"""The predictor: from context tokens and the positions asked for to representations."""

import torch
from torch import Tensor, nn

from fastjepa.models.block import NORM_EPS
from fastjepa.models.layout import Layout, dense_layout, packed_layout
from fastjepa.models.positions import sincos_2d
from fastjepa.models.stack import Stack
from fastjepa_kernels.checks import require, require_index, require_index_values, shape_of


class Predictor(nn.Module):
    """A narrow ViT over [context; mask tokens] for each of M target blocks (arXiv:2301.08243).

    Args:
        grid: patches per column and row.
        encoder_width: D, of the tokens that come in and of the predictions.
        width, depth, heads: of the predictor itself.

    Attributes:
        skip_dead_work: compute what is the same for all blocks once, and what nothing reads not at all; the
            predictions are the same.
    """

    predictor_pos_embed: Tensor  # [1, N, width]

    def __init__(self, grid: tuple[int, int], encoder_width: int, width: int, depth: int, heads: int) -> None:
        super().__init__()
        self.skip_dead_work = True
        self.predictor_embed = nn.Linear(encoder_width, width)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width))
        self.register_buffer("predictor_pos_embed", sincos_2d(grid, width))
        self.predictor_blocks = Stack(depth, width, heads)
        self.predictor_norm = nn.LayerNorm(width, eps=NORM_EPS)
        self.predictor_proj = nn.Linear(width, encoder_width)

    def forward(
        self,
        context: Tensor,
        context_index: Tensor,
        target_index: Tensor,
        cu_seqlens: Tensor | None = None,
        longest: int | None = None,
    ) -> Tensor:
        """Predict the representations at `target_index`.

        Args:
            context: encoder output, [B, K, D], or packed [T, D].
            context_index: [B, K] or packed [T].
            target_index: [M, B, P].
            cu_seqlens: int32 [B + 1] if packed.
            longest: a bound of the lengths that it cuts; by default all patches of an image.

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
        blocks, _, patches, width = asked.shape
        if cu_seqlens is None:
            layout = dense_layout(blocks, batch, seen.shape[1], patches, seen.device)
        else:
            layout = packed_layout(cu_seqlens, len(seen), blocks, patches, longest or len(positions))
        tokens = torch.cat([seen.reshape(-1, width), asked.reshape(-1, width)])  # [T + M B P, d]
        x, delta = self._run(tokens, layout)  # [M B P, d]
        x = self.predictor_blocks.finish(self.predictor_norm, x, delta)
        return self.predictor_proj(x).unflatten(0, (blocks, batch, patches))

    def _run(self, tokens: Tensor, layout: Layout) -> tuple[Tensor, Tensor | None]:
        """The rows asked for after the last block, [M * B * P, d] and what is to be added to them."""
        stack, rows = self.predictor_blocks, layout.asked_rows
        if not self.skip_dead_work:
            x, delta = stack.run(layout.spread(tokens), layout.sequences)
            return x.index_select(0, rows), None if delta is None else delta.index_select(0, rows)
        # Norm and QKV of the first block see rows alone: those of the context are the same for all M blocks.
        return stack.run(tokens, layout.sequences, rows, layout.spread)
