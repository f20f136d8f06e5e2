"""The decoder of a masked autoencoder: from the visible tokens to the pixels of every patch."""

import torch
from torch import Tensor, nn

from fastjepa.models.block import NORM_EPS
from fastjepa.models.positions import sincos_2d
from fastjepa.models.sequences import equal_sequences
from fastjepa.models.stack import Stack
from fastjepa.models.vit import ViTShape


class MAEDecoder(nn.Module):
    """A narrow ViT over all patches and the class token (arXiv:2111.06377).

    Args:
        shape: of the encoder, which has a class token.
        width, depth, heads: of the decoder itself.
    """

    decoder_pos_embed: Tensor  # [1, N + 1, width]

    def __init__(self, shape: ViTShape, width: int, depth: int, heads: int) -> None:
        super().__init__()
        self.decoder_embed = nn.Linear(shape.width, width)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width))
        self.register_buffer("decoder_pos_embed", sincos_2d(shape.grid, width, class_token=True))
        self.decoder_blocks = Stack(depth, width, heads)
        self.decoder_norm = nn.LayerNorm(width, eps=NORM_EPS)
        self.decoder_pred = nn.Linear(width, shape.channels * shape.patch_size**2)

    def forward(self, latent: Tensor, context_index: Tensor) -> Tensor:
        """Pixels of every patch.

        Args:
            latent: [B, 1 + K, D], the class token first.
            context_index: [B, K], which patches the other tokens are.

        Returns:
            [B, N, p * p * C], the channel changing fastest, as the published weights have it.
        """
        tokens = self.decoder_embed(latent)  # [B, 1 + K, d]
        batch, _, width = tokens.shape
        patches = self.decoder_pos_embed.shape[1] - 1
        index = context_index.long()[:, :, None].expand(-1, -1, width)  # [B, K, d]
        filled = self.mask_token.to(tokens.dtype).expand(batch, patches, -1).scatter(1, index, tokens[:, 1:])
        x = torch.cat([tokens[:, :1], filled], dim=1) + self.decoder_pos_embed.to(
            tokens.dtype
        )  # [B, 1 + N, d]
        sequences = equal_sequences(batch, patches + 1, x.device)
        x, delta = self.decoder_blocks.run(x.flatten(0, 1), sequences)
        x = self.decoder_blocks.finish(self.decoder_norm, x, delta)
        return self.decoder_pred(x.view(batch, patches + 1, width)[:, 1:])
