"""I-JEPA with the behaviour of the published code (arXiv:2301.08243), and the same in today's torch.

Published: attention as matrices, every patch embedded for the context encoder too, gathers by an int64 index
as large as their result, fp32 LayerNorm of every target token before most are dropped, an unfused AdamW, a
Python loop for the target encoder, and in every step a read of the loss, of the norm of every gradient of an
encoder's weight matrix (four of a block, and the patch embedding's) and of a timer.
`modern`: scaled_dot_product_attention, compiled blocks, gathers by an expanded index, a fused AdamW, one
multi-tensor lerp, TF32 where fp32 is left, and no read. The data flow is the published one in both.
"""

import copy
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.kernels import published
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


def take(x: Tensor, index: Tensor, modern: bool) -> Tensor:
    """Rows [M * B, K, D] of x [B, N, D] at index [M, B, K], block by block."""
    if not modern:
        return published.apply_masks(x, list(index))
    channels = index[..., None].expand(-1, -1, -1, x.shape[2])  # [M, B, K, D], without memory
    return x.expand(index.shape[0], -1, -1, -1).gather(2, channels).flatten(0, 1)


class Predictor(nn.Module):
    """A narrow ViT over [context; mask tokens] for each of M target blocks."""

    predictor_pos_embed: Tensor  # [1, N, d]

    def __init__(self, shape: ViTShape, width: int, depth: int, heads: int, modern: bool) -> None:
        super().__init__()
        self.modern = modern
        self.predictor_embed = nn.Linear(shape.width, width)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width))
        self.register_buffer("predictor_pos_embed", sincos_2d(shape.grid, width))
        self.predictor_blocks = nn.ModuleList(Block(width, heads, 4.0, modern) for _ in range(depth))
        self.predictor_norm = nn.LayerNorm(width, eps=NORM_EPS)
        self.predictor_proj = nn.Linear(width, shape.width)

    def forward(self, context: Tensor, context_index: Tensor, target_index: Tensor) -> Tensor:
        """context [B, K, D], context_index [B, K], target_index [M, B, P]: [M * B, P, D]."""
        blocks, batch, _ = target_index.shape
        positions = self.predictor_pos_embed.expand(batch, -1, -1)  # [B, N, d]
        if not self.modern:
            positions = positions.contiguous()  # published: the table once for each image
        x = self.predictor_embed(context) + take(positions, context_index[None], self.modern)  # [B, K, d]
        masked = self.mask_token + take(positions, target_index, self.modern)  # [M * B, P, d]
        x = torch.cat([x.repeat(blocks, 1, 1), masked], dim=1)  # [M * B, K + P, d]
        for block in self.predictor_blocks:
            x = block(x)
        return self.predictor_proj(self.predictor_norm(x)[:, context.shape[1] :])


class ReferenceIJEPA(nn.Module):
    """Context encoder, predictor and target encoder.

    Weights start as torch has them, the target encoder's as the encoder's. `fastjepa.models.initialise` works
    on `encoder` and `predictor`, and `update_target(0.0)` then makes the target encoder the encoder again.

    Args:
        shape: of the encoders, without a class token.
        predictor_width, predictor_depth, predictor_heads: of the predictor.
        modern: as the module's text says.
    """

    def __init__(
        self,
        shape: ViTShape,
        predictor_width: int,
        predictor_depth: int,
        predictor_heads: int,
        *,
        modern: bool = False,
    ) -> None:
        super().__init__()
        if shape.class_token:
            raise ValueError("I-JEPA's encoder has no class token: give a ViTShape with class_token=False")
        self.modern = modern
        self.encoder = Encoder(shape, modern)
        self.predictor = Predictor(shape, predictor_width, predictor_depth, predictor_heads, modern)
        self.target_encoder = copy.deepcopy(self.encoder).requires_grad_(False)

    def loss(self, images: Tensor, context_index: Tensor, target_index: Tensor) -> Tensor:
        """Smooth L1 to the layer-normed target representations, the mean over all M * B * P * D elements.

        Args:
            images: [B, C, H, W], floating point, already normalised.
            context_index: [B, K].
            target_index: [M, B, P].
        """
        context_index, target_index = context_index.long(), target_index.long()
        wanted = self._targets(images, target_index)
        x = take(self.encoder.embed(images), context_index[None], self.modern)  # [B, K, D]
        prediction = self.predictor(self.encoder(x), context_index, target_index)  # [M * B, P, D]
        return F.smooth_l1_loss(prediction, wanted)

    @torch.no_grad()
    def _targets(self, images: Tensor, target_index: Tensor) -> Tensor:
        """[M * B, P, D]; both norms are over every patch."""
        hidden = self.target_encoder(self.target_encoder.embed(images))  # [B, N, D]
        hidden = F.layer_norm(hidden, hidden.shape[-1:])
        wanted = take(hidden, target_index, self.modern)  # [M * B, P, D]
        if self.modern:
            return wanted
        # Each block once for each context: there is one, and it is a copy.
        return wanted.unflatten(0, target_index.shape[:2]).repeat_interleave(1, dim=0).flatten(0, 1)

    @torch.no_grad()
    def update_target(self, momentum: float) -> None:
        """target <- momentum * target + (1 - momentum) * encoder, over the parameters."""
        targets: list[Tensor] = list(self.target_encoder.parameters())
        sources: list[Tensor] = list(self.encoder.parameters())
        if self.modern:
            torch._foreach_lerp_(targets, sources, 1 - momentum)
        else:
            published.ema(targets, sources, momentum)


class IJEPATrainer:
    """Whole optimizer steps at constant rates; schedules would cost the host alone.

    Args:
        model: goes to `device`, its weights fp32.
        precision: "bf16" as published, with autocast and a gradient scaler that bf16 has no need of (a modern
            model does without); "fp16" with both, "fp32" with neither.
        device: where to train.
        learning_rate, weight_decay: of AdamW, as published.
        backend: of torch.compile, for a modern model.
        static_shapes: whether K and P are the same in every step, so that a modern model may be compiled for
            them alone. In `truncate` they are not, and torch.compile itself finds out what changes.
    """

    def __init__(
        self,
        model: ReferenceIJEPA,
        *,
        precision: Precision,
        device: torch.device | str,
        learning_rate: float = 1e-3,
        weight_decay: float = 0.04,
        backend: str = "inductor",
        static_shapes: bool = False,
    ) -> None:
        self.model, self.precision, self.device = model, precision, torch.device(device)
        model.to(self.device)
        if model.modern:
            compile_blocks(model, backend, dynamic=False if static_shapes else None)
        self.optimizer = torch.optim.AdamW(
            [
                decayed(network.parameters(), weight_decay, is_decayed)
                for is_decayed in (True, False)
                for network in (model.encoder, model.predictor)
            ],
            lr=learning_rate,
            betas=(0.9, 0.999),
            fused=model.modern or None,  # None takes torch's multi-tensor kernels on a GPU, False a loop
        )
        scaled = ("fp16",) if model.modern else ("fp16", "bf16")
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=precision in scaled)
        self.logged = {
            name: weight
            for name, weight in model.encoder.named_parameters()
            if weight.ndim > 1 and not name.endswith(".bias")
        }
        self.grad_norms: dict[str, float] = {}  # of the last published step
        self.step_ms = math.nan  # of the last published step, on a GPU

    def step(
        self, images: Tensor, context_index: Tensor, target_index: Tensor, momentum: float
    ) -> Tensor | float:
        """One optimizer step, then the target encoder's; arguments as in `ReferenceIJEPA.loss`.

        Returns:
            The loss: a number if published, a tensor on the device, without any wait for it, if modern.
        """
        images = images.to(self.device, non_blocking=True)
        context_index = context_index.to(self.device, non_blocking=True)
        target_index = target_index.to(self.device, non_blocking=True)
        run = self._update if self.model.modern else self._published
        with library_settings(self.device, self.model.modern):
            return run(images, context_index, target_index, momentum)

    def _published(
        self, images: Tensor, context_index: Tensor, target_index: Tensor, momentum: float
    ) -> float:
        """The step between two events of a timer, for the end of which the host waits."""
        on_gpu = self.device.type == "cuda"
        if on_gpu:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
        loss = float(self._update(images, context_index, target_index, momentum))
        if on_gpu:
            end.record()
            torch.cuda.synchronize(self.device)
            self.step_ms = start.elapsed_time(end)
        assert not math.isnan(loss), "the loss is not a number"
        return loss

    def _update(self, images: Tensor, context_index: Tensor, target_index: Tensor, momentum: float) -> Tensor:
        with autocast(self.precision, self.device):
            loss = self.model.loss(images, context_index, target_index)
        self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if not self.model.modern:  # each norm is read from the device by itself
            self.grad_norms = {n: float(p.grad.norm()) for n, p in self.logged.items() if p.grad is not None}
        self.optimizer.zero_grad()
        self.model.update_target(momentum)
        return loss.detach()
