"""MAE with the behaviour of the published code (arXiv:2111.06377), and the same in today's torch.

Published: attention as matrices, every patch embedded before three quarters are dropped, gathers by an int64
index as large as their result, an unfused AdamW, and a host that waits for the device in every step.
`modern`: scaled_dot_product_attention, compiled blocks, gathers by an expanded index, a fused AdamW, TF32
where fp32 is left, and no wait. The data flow, with its dead work, is the published one in both.
"""

import math

import torch
from torch import Tensor, nn

from bench.reference.vit import (
    Block,
    Encoder,
    Precision,
    autocast,
    compile_blocks,
    decayed,
    library_settings,
)
from fastjepa.models import ViTShape
from fastjepa.models.block import NORM_EPS
from fastjepa.models.positions import sincos_2d

PIXEL_EPS = 1e-6  # under the root of a patch's variance


def take(x: Tensor, index: Tensor, modern: bool) -> Tensor:
    """Rows [B, K, D] of x [B, N, D] at index [B, K]."""
    column, width = index[:, :, None], x.shape[2]
    # `repeat` writes the index once for each of D channels, `expand` never.
    return x.gather(1, column.expand(-1, -1, width) if modern else column.repeat(1, 1, width))


class Decoder(nn.Module):
    """From the visible tokens to the pixels of every patch."""

    decoder_pos_embed: Tensor  # [1, N + 1, d]

    def __init__(self, shape: ViTShape, width: int, depth: int, heads: int, modern: bool) -> None:
        super().__init__()
        self.modern = modern
        self.decoder_embed = nn.Linear(shape.width, width)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width))
        self.register_buffer("decoder_pos_embed", sincos_2d(shape.grid, width, class_token=True))
        self.decoder_blocks = nn.ModuleList(Block(width, heads, 4.0, modern) for _ in range(depth))
        self.decoder_norm = nn.LayerNorm(width, eps=NORM_EPS)
        self.decoder_pred = nn.Linear(width, shape.channels * shape.patch_size**2)

    def forward(self, latent: Tensor, restore: Tensor) -> Tensor:
        """latent [B, 1 + K, D], restore [B, N]: each patch's place in [kept; hidden]. Gives [B, N, p p C]."""
        x = self.decoder_embed(latent)  # [B, 1 + K, d]
        batch, seen, _ = x.shape
        masked = self.mask_token.to(x.dtype).repeat(batch, restore.shape[1] + 1 - seen, 1)  # [B, N - K, d]
        patches = take(torch.cat([x[:, 1:], masked], dim=1), restore, self.modern)  # [B, N, d]
        x = torch.cat([x[:, :1], patches], dim=1) + self.decoder_pos_embed  # [B, 1 + N, d]
        for block in self.decoder_blocks:
            x = block(x)
        return self.decoder_pred(self.decoder_norm(x))[:, 1:]


class ReferenceMAE(nn.Module):
    """Encoder and decoder. Weights start as torch has them: `fastjepa.models.initialise` works on it.

    Args:
        shape: of the encoder, with a class token.
        decoder_width, decoder_depth, decoder_heads: of the decoder.
        mask_ratio: the fraction of patches that is hidden.
        modern: as the module's text says.
    """

    def __init__(
        self,
        shape: ViTShape,
        *,
        decoder_width: int = 512,
        decoder_depth: int = 8,
        decoder_heads: int = 16,
        mask_ratio: float = 0.75,
        modern: bool = False,
    ) -> None:
        super().__init__()
        if not shape.class_token:
            raise ValueError("MAE's encoder has a class token: give a ViTShape with class_token=True")
        self.mask_ratio, self.modern = mask_ratio, modern
        self.encoder = Encoder(shape, modern)
        self.decoder = Decoder(shape, decoder_width, decoder_depth, decoder_heads, modern)

    def loss(self, images: Tensor, noise: Tensor | None = None) -> Tensor:
        """Mean squared error over the hidden patches, their pixels normalised patch by patch.

        Args:
            images: [B, C, H, W], floating point, already normalised.
            noise: [B, N]; the int((1 - mask_ratio) * N) patches with the least are kept. Uniform if None.
        """
        x = self.encoder.embed(images)  # [B, N, D]
        batch, patches, _ = x.shape
        if noise is None:
            noise = torch.rand(batch, patches, device=x.device)
        order = noise.argsort(dim=1)  # [B, N]
        restore = order.argsort(dim=1)  # [B, N]
        kept = int(patches * (1 - self.mask_ratio))
        latent = self.encoder(take(x, order[:, :kept], self.modern))  # [B, 1 + K, D]
        prediction = self.decoder(latent, restore)  # [B, N, p p C]

        is_hidden = torch.ones(batch, patches, device=x.device)
        is_hidden[:, :kept] = 0
        is_hidden = is_hidden.gather(1, restore)  # [B, N]
        error = (prediction - self._pixels(images)).square().mean(dim=-1)  # [B, N], of seen patches too
        return (error * is_hidden).sum() / is_hidden.sum()

    def _pixels(self, images: Tensor) -> Tensor:
        """Every patch normalised, the channel changing fastest: [B, N, p p C]."""
        batch, channels, _, _ = images.shape
        (rows, columns), side = self.encoder.shape.grid, self.encoder.shape.patch_size
        pixels = images.reshape(batch, channels, rows, side, columns, side).permute(0, 2, 4, 3, 5, 1)
        pixels = pixels.reshape(batch, rows * columns, side * side * channels)
        variance, mean = torch.var_mean(pixels, dim=-1, keepdim=True)  # unbiased
        return (pixels - mean) / (variance + PIXEL_EPS).sqrt()


class MAETrainer:
    """Whole optimizer steps at constant rates; schedules would cost the host alone.

    Args:
        model: goes to `device`, its weights fp32.
        precision: "fp16" as published, with a gradient scaler; "bf16" has autocast alone, "fp32" neither.
        device: where to train.
        learning_rate, weight_decay: of AdamW, as published for a batch of 256.
        backend: of torch.compile, for a modern model.
    """

    def __init__(
        self,
        model: ReferenceMAE,
        *,
        precision: Precision,
        device: torch.device | str,
        learning_rate: float = 1.5e-4,
        weight_decay: float = 0.05,
        backend: str = "inductor",
    ) -> None:
        self.model, self.precision, self.device = model, precision, torch.device(device)
        model.to(self.device)
        if model.modern:
            compile_blocks(model, backend, dynamic=False)  # a patch is as often seen in every step
        self.parameters = list(model.parameters())
        self.optimizer = torch.optim.AdamW(
            [decayed(self.parameters, weight_decay, is_decayed) for is_decayed in (False, True)],
            lr=learning_rate,
            betas=(0.9, 0.95),
            fused=model.modern or None,  # None takes torch's multi-tensor kernels on a GPU, False a loop
        )
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=precision == "fp16")
        self.grad_norm: Tensor | None = None  # of the last published step, on the device

    def step(self, images: Tensor, noise: Tensor | None = None) -> Tensor | float:
        """One optimizer step; arguments as in `ReferenceMAE.loss`.

        Returns:
            The loss: a number if published, a tensor on the device, without any wait for it, if modern.

        Raises:
            FloatingPointError: the loss of a published step is not finite.
        """
        images = images.to(self.device, non_blocking=True)
        run = self._modern if self.model.modern else self._published
        with library_settings(self.device, self.model.modern):
            return run(images, noise)

    def _published(self, images: Tensor, noise: Tensor | None) -> float:
        with autocast(self.precision, self.device):
            loss = self.model.loss(images, noise)
        value = loss.item()  # the host waits for the forward pass
        if not math.isfinite(value):
            raise FloatingPointError(f"the loss is {value}: lower the learning rate, or train in bf16")
        self.scaler.scale(loss).backward()
        self.scaler.unscale_(self.optimizer)
        norms = [p.grad.norm() for p in self.parameters if p.grad is not None]
        self.grad_norm = torch.stack(norms).norm()
        self.scaler.step(self.optimizer)  # in fp16 it asks the device whether a gradient overflowed
        self.scaler.update()
        self.optimizer.zero_grad()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return value

    def _modern(self, images: Tensor, noise: Tensor | None) -> Tensor:
        with autocast(self.precision, self.device):
            loss = self.model.loss(images, noise)
        self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizer)  # a fused optimizer skips an overflow on the device
        self.scaler.update()
        self.optimizer.zero_grad()
        return loss.detach()
