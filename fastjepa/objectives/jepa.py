"""I-JEPA: predict the target encoder's representation of what is hidden (arXiv:2301.08243)."""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import fastjepa_kernels as fk
from fastjepa.masks import Masks
from fastjepa.models import Predictor, VisionTransformer
from fastjepa.objectives.step import Step


class Student(nn.Module):
    """Context encoder and predictor: what the optimizer moves."""

    def __init__(self, encoder: VisionTransformer, predictor: Predictor) -> None:
        super().__init__()
        self.encoder = encoder
        self.predictor = predictor

    def forward(
        self, images: Tensor, context_index: Tensor, target_index: Tensor, cu_seqlens: Tensor | None = None
    ) -> Tensor:
        """Predictions [M, B, P, D]; arguments as in `JEPA.loss`."""
        context = self.encoder(images, context_index, cu_seqlens)  # [B, K, D] or [T, D]
        return self.predictor(context, context_index, target_index, cu_seqlens)


class JEPA(nn.Module):
    """Encoder, predictor, and the target encoder that follows the encoder without gradient.

    Args:
        encoder: becomes the context encoder.
        predictor: its predictor.
        target_encoder: a copy of `encoder` by default.
    """

    def __init__(
        self,
        encoder: VisionTransformer,
        predictor: Predictor,
        target_encoder: VisionTransformer | None = None,
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.predictor = predictor
        self.target_encoder = copy.deepcopy(encoder) if target_encoder is None else target_encoder
        self.target_encoder.requires_grad_(False)
        # Optimizer, epoch and so on, of a published file that the model was loaded from.
        self.published_extras: dict[str, Any] | None = None

    def predict(
        self, images: Tensor, context_index: Tensor, target_index: Tensor, cu_seqlens: Tensor | None = None
    ) -> Tensor:
        """What the predictor says of the positions asked for: [M, B, P, D]; arguments as in `loss`."""
        return self.trainable()(images, context_index, target_index, cu_seqlens)

    def loss(
        self, images: Tensor, context_index: Tensor, target_index: Tensor, cu_seqlens: Tensor | None = None
    ) -> Tensor:
        """Smooth L1 between predictions and the layer-normed target representations.

        Args:
            images: [B, C, H, W], uint8, or floating point and already normalised.
            context_index: [B, K], or packed [T] with `cu_seqlens`.
            target_index: [M, B, P].
            cu_seqlens: int32 [B + 1].

        Returns:
            A scalar: the mean over all M * B * P * D elements.
        """
        return self.step(self.trainable(), images, Masks(context_index, target_index, cu_seqlens)).loss

    def trainable(self) -> Student:
        """The module to hand to an optimizer or a DeepSpeed engine; it shares this one's weights."""
        return Student(self.encoder, self.predictor)

    def step(self, network: Callable[..., Tensor], images: Tensor, masks: Masks) -> Step:
        """One forward pass, with the student run through `network` (the engine around `trainable()`)."""
        hidden = self.target_hidden(images)  # [B, N, D]
        prediction = network(images, masks.context, masks.targets, masks.cu_seqlens)  # [M, B, P, D]
        norm = self.target_encoder.norm
        loss = fk.jepa_loss(prediction, hidden, masks.targets, norm.weight, norm.bias, norm.eps)
        return Step(loss, hidden, prediction.detach())

    @torch.no_grad()
    def target_hidden(self, images: Tensor) -> Tensor:
        """[B, N, D] of all patches, before the target encoder's final norm."""
        return self.target_encoder(images, final_norm=False)

    @torch.no_grad()
    def update_target(self, momentum: float | Tensor) -> None:
        """target <- momentum * target + (1 - momentum) * encoder, over the parameters, as published."""
        fk.ema_update_(
            list(self.target_encoder.parameters()), [p.data for p in self.encoder.parameters()], momentum
        )
