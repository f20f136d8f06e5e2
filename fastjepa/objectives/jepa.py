"""I-JEPA: predict the target encoder's representation of what is hidden (arXiv:2301.08243)."""

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

import fastjepa_kernels as fk
from fastjepa.masks import Masks
from fastjepa.models import Predictor, VisionTransformer
from fastjepa.models.fp8 import Fp8Encoder
from fastjepa.objectives.step import WATCHED, Step


class Student(nn.Module):
    """Context encoder and predictor: what the optimizer moves."""

    def __init__(self, encoder: VisionTransformer, predictor: Predictor) -> None:
        super().__init__()
        self.encoder = encoder
        self.predictor = predictor

    def forward(
        self,
        images: Tensor,
        context_index: Tensor,
        target_index: Tensor,
        cu_seqlens: Tensor | None = None,
        longest: int | None = None,
    ) -> Tensor:
        """Predictions [M, B, P, D]; arguments as in `JEPA.loss`, and `longest` as in `Masks`."""
        context = self.encoder(images, context_index, cu_seqlens, longest=longest)  # [B, K, D] or [T, D]
        return self.predictor(context, context_index, target_index, cu_seqlens, longest)


class JEPA(nn.Module):
    """Encoder, predictor, and the target encoder that follows the encoder without gradient.

    Args:
        encoder: becomes the context encoder.
        predictor: its predictor.
        target_encoder: a copy of `encoder` by default.

    Attributes:
        skip_dead_work: let the target encoder's last block go on with the tokens that masks ask for alone.
        fp8: the target encoder with its GEMMs in fp8; None to run it as it is. To be refreshed whenever the
            target encoder has changed.
        target_stream: the stream of a GPU on which the target encoder runs beside the student; None for none.
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
        self.skip_dead_work = True
        self.fp8: Fp8Encoder | None = None
        self.target_stream: torch.cuda.Stream | None = None
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
        with self._beside(images):
            hidden, places = self.target_hidden(images, masks)
        context, cut = masks.context, (masks.cu_seqlens, masks.longest)
        prediction = network(images, context, masks.targets, *cut)  # [M, B, P, D]
        self._join(hidden)
        norm, width = self.target_encoder.norm, hidden.shape[-1]
        # Each target token is a row of one long image.
        rows, asked = hidden.view(1, -1, width), places.view(1, 1, -1)
        said = prediction.reshape(1, 1, -1, width)
        loss = fk.jepa_loss(said, rows, asked, norm.weight, norm.bias, norm.eps)
        whole = masks.asked_rows is None or not self.skip_dead_work
        return Step(loss, prediction.detach(), hidden.view(len(images), -1, width) if whole else None)

    @torch.no_grad()
    def watched(self, step: Step, images: Tensor) -> Tensor:
        """Of some images of a step the target encoder's tokens before its final norm: [b, N, D].

        Where the step left those out that nobody predicts, this is a pass of its own: signs of collapse need
        all places of an image, and no image more than another.
        """
        if step.hidden is not None:
            return step.hidden[:WATCHED]
        where = self.target_encoder.norm.weight.device
        return self.target_encoder(images[:WATCHED].to(where), final_norm=False)

    @torch.no_grad()
    def target_hidden(self, images: Tensor, masks: Masks) -> tuple[Tensor, Tensor]:
        """The target encoder's tokens before its final norm, and which are predicted.

        Returns:
            hidden [R, D], of all B * N tokens or of those that the masks ask for, and int64 [M, B, P], the
            rows of the target tokens in it.
        """
        rows = masks.asked_rows if self.skip_dead_work else None
        if self.fp8 is not None:
            hidden = self.fp8.hidden(images, rows)
        else:
            hidden = self.target_encoder(images, final_norm=False, rows=rows)
        if rows is not None:
            assert masks.asked_places is not None, "asked_rows and asked_places come together"
            return hidden, masks.asked_places
        batch, patches, _ = hidden.shape
        first = torch.arange(batch, device=hidden.device)[:, None] * patches
        return hidden.flatten(0, 1), first + masks.targets

    def _beside(self, images: Tensor) -> AbstractContextManager[Any]:
        """Where the target encoder runs: on its own stream, after what is on the present one, or there."""
        if self.target_stream is None:
            return nullcontext()
        self.target_stream.wait_stream(torch.cuda.current_stream())
        images.record_stream(self.target_stream)
        return torch.cuda.stream(self.target_stream)

    def _join(self, hidden: Tensor) -> None:
        if self.target_stream is not None:
            present = torch.cuda.current_stream()
            present.wait_stream(self.target_stream)
            hidden.record_stream(present)

    @torch.no_grad()
    def update_target(self, momentum: float | Tensor) -> None:
        """target <- momentum * target + (1 - momentum) * encoder, over the parameters, as published."""
        fk.ema_update_(
            list(self.target_encoder.parameters()), [p.data for p in self.encoder.parameters()], momentum
        )
