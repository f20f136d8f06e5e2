"""MAE, the reference objective: paint the pixels of what is hidden (arXiv:2111.06377)."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastjepa.masks import Masks
from fastjepa.models import MAEDecoder, VisionTransformer
from fastjepa.objectives.step import WATCHED, Step

PIXEL_EPS = 1e-6  # under the root of a patch's variance


class MAE(nn.Module):
    """Encoder with class token, and decoder.

    Args:
        encoder: with a class token.
        decoder: None for an encoder alone, as published for fine-tuning: `loss` then says what is missing.
        mask_ratio: the fraction of patches that `loss` hides.
        norm_pix_loss: what `step` compares with: pixels normalised patch by patch, or plain ones.
    """

    def __init__(
        self,
        encoder: VisionTransformer,
        decoder: MAEDecoder | None,
        mask_ratio: float = 0.75,
        norm_pix_loss: bool = True,
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.decoder = decoder
        self.mask_ratio = mask_ratio
        self.norm_pix_loss = norm_pix_loss

    def forward(
        self, images: Tensor, context_index: Tensor, target_index: Tensor, norm_pix_loss: bool = True
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The loss over the hidden patches.

        Args:
            images: [B, C, H, W], uint8, or floating point and already normalised.
            context_index: [B, K], the patches the encoder sees.
            target_index: [B, N - K], the patches whose pixels count.
            norm_pix_loss: compare with pixels normalised patch by patch.

        Returns:
            loss (scalar), the decoder's output [B, N, p p C], the encoder's [B, 1 + K, D] before its norm.
        """
        if self.decoder is None:
            raise ValueError(
                "this file held an encoder alone: there is no decoder to reconstruct pixels with. "
                "Load a full pretraining checkpoint (with decoder_* tensors) for .loss"
            )
        hidden = self.encoder(images, context_index, final_norm=False)  # [B, 1 + K, D]
        prediction = self.decoder(self.encoder.norm(hidden), context_index)  # [B, N, p p C]
        pixels = self._pixels(images, target_index, norm_pix_loss)  # [B, N - K, p p C]
        index = target_index.long()[:, :, None].expand(-1, -1, prediction.shape[2])
        return F.mse_loss(prediction.gather(1, index).to(pixels.dtype), pixels), prediction, hidden

    @torch.no_grad()
    def _pixels(self, images: Tensor, target_index: Tensor, norm_pix_loss: bool) -> Tensor:
        # A model in bf16 must not round what it is compared with.
        dtype = torch.promote_types(self.encoder.norm.weight.dtype, torch.float32)
        pixels = self.encoder.patches(images, target_index, dtype=dtype)  # [B, N - K, C p p]
        pixels = pixels.unflatten(2, (self.encoder.shape.channels, -1)).transpose(2, 3).flatten(2)
        if norm_pix_loss:
            variance, mean = torch.var_mean(pixels, dim=-1, keepdim=True)
            pixels = (pixels - mean) / (variance + PIXEL_EPS).sqrt()
        return pixels

    def loss(self, images: Tensor, noise: Tensor | None = None, norm_pix_loss: bool = True) -> Tensor:
        """Mean squared error over the hidden patches.

        Args:
            images: [B, C, H, W], uint8, or floating point and already normalised.
            noise: [B, N]; the int((1 - mask_ratio) * N) patches with the least are kept. Uniform if None.
            norm_pix_loss: compare with pixels normalised patch by patch.
        """
        batch, patches = images.shape[0], self.encoder.shape.grid[0] * self.encoder.shape.grid[1]
        if noise is None:
            noise = torch.rand(batch, patches, device=images.device)
        if noise.shape != (batch, patches):
            raise ValueError(f"noise must be [B, N] = [{batch}, {patches}], got {list(noise.shape)}")
        order = noise.argsort(dim=1)  # [B, N]
        kept = int(patches * (1 - self.mask_ratio))
        return self(images, order[:, :kept], order[:, kept:], norm_pix_loss)[0]

    def trainable(self) -> "MAE":
        """The module to hand to an optimizer or a DeepSpeed engine."""
        return self

    def step(self, network: Callable[..., tuple[Tensor, ...]], images: Tensor, masks: Masks) -> Step:
        """One forward pass, with this module run through `network` (the engine around `trainable()`)."""
        loss, prediction, hidden = network(images, masks.context, masks.targets[0], self.norm_pix_loss)
        return Step(loss, prediction.detach(), hidden.detach()[:, 1:])

    def watched(self, step: Step, _images: Tensor) -> Tensor:
        """Of some images of a step the encoder's tokens before its final norm, no class token: [b, K, D]."""
        assert step.hidden is not None, "a step of MAE has all there are"
        return step.hidden[:WATCHED]
