"""What a run records between two log lines: kept on the device, read together, without a wait per step."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from fastjepa.engine.launch import World
from fastjepa.evaluation.collapse import (
    CollapseSigns,
    between_image_std,
    rankme,
    token_std,
)
from fastjepa.masks import Masks
from fastjepa.objectives import Step

RANK_TOKENS = 4096  # tokens whose effective rank is taken: several times any width


class NonFinite(RuntimeError):
    """The loss or the weights are no longer finite."""


@dataclass(frozen=True)
class Interval:
    """What happened between two log lines.

    Attributes:
        steps: optimizer steps.
        loss: their mean, over ranks too.
        bad_step: the first whose loss is not finite, or None.
        signs: of collapse, on this rank's last micro-batch.
        prediction_rankme: effective rank of its predictions.
        context_tokens, target_tokens: mean per image, of that micro-batch.
    """

    steps: int
    loss: float
    bad_step: int | None
    signs: CollapseSigns
    prediction_rankme: float
    context_tokens: float
    target_tokens: float


@dataclass
class Recorder:
    """Collects losses, and remembers the last forward pass."""

    world: World
    _losses: list[Tensor] = field(default_factory=list)
    _first_step: int = 0
    _last: tuple[Step, Masks] | None = None

    def add(self, step: int, outs: list[Step], masks: Masks) -> None:
        """Note what the micro-batches of optimizer step `step` gave; `masks` are those of one."""
        if not self._losses:
            self._first_step = step
        self._losses.append(torch.stack([out.loss.detach() for out in outs]).mean())
        self._last = outs[-1], masks

    def read(self) -> Interval:
        """All that was noted since the last call (every rank must call this)."""
        assert self._last is not None, "read after at least one step"
        step, masks = self._last
        tokens = step.hidden.flatten(0, 1)[:RANK_TOKENS]  # [B N, D]
        predicted = step.prediction.flatten(0, -2)[:RANK_TOKENS]  # [M B P, D]
        measures = torch.stack(
            [
                token_std(step.hidden).double(),
                between_image_std(step.hidden).double(),
                rankme(tokens).double(),
                predicted.double().std(dim=0).mean(),
                rankme(predicted).double(),
            ]
        )
        losses = self.world.mean(torch.stack(self._losses))  # [steps]
        self._losses = []
        bad = (~torch.isfinite(losses)).nonzero().flatten().tolist()
        *signs, prediction_rankme = measures.tolist()
        images = masks.targets.shape[1]
        return Interval(
            steps=len(losses),
            loss=float(losses.mean()),
            bad_step=self._first_step + bad[0] if bad else None,
            signs=CollapseSigns(*signs),
            prediction_rankme=prediction_rankme,
            context_tokens=masks.context.numel() / images,
            target_tokens=masks.targets.numel() / images,
        )
