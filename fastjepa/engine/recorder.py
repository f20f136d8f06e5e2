"""What a run records between two log lines: kept on the device, read together, without a wait per step."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from fastjepa.data.loader import Batch
from fastjepa.engine.processes.world import World
from fastjepa.evaluation.collapse import (
    CollapseSigns,
    between_image_std,
    prediction_std,
    rankme,
    token_std,
)
from fastjepa.objectives import JEPA, MAE, Step

RANK_TOKENS = 4096  # tokens whose effective rank is taken: several times any width


@dataclass(frozen=True)
class Interval:
    """What happened between two log lines.

    Attributes:
        steps: optimizer steps, in this process.
        signs: of collapse, on this rank's last micro-batch.
        prediction_rankme: effective rank of its predictions.
        context_tokens, target_tokens: mean per image, of that micro-batch.
    """

    steps: int
    signs: CollapseSigns
    prediction_rankme: float
    context_tokens: float
    target_tokens: float


@dataclass
class Recorder:
    """Collects losses, and remembers the last forward pass.

    Attributes:
        earlier: losses that the run had collected where it was resumed.
    """

    world: World
    earlier: tuple[float, ...] = ()
    _losses: list[Tensor] = field(default_factory=list)
    _last: tuple[Step, Batch] | None = None

    def add(self, loss: Tensor, last: Step, batch: Batch) -> None:
        """Note the loss of an optimizer step, and what its last micro-batch gave."""
        self._losses.append(loss)
        self._last = last, batch

    def losses(self) -> tuple[float, ...]:
        """Of the steps since the last `read`, means over ranks (every rank must call this)."""
        if not self._losses:
            return self.earlier
        return (*self.earlier, *self.world.mean(torch.stack(self._losses)).tolist())

    def bad_ranks(self, ago: int) -> list[int]:
        """The ranks whose own loss `ago` steps before the last is no number (every rank must call this).

        None where the loss is one, and where it is not known, of steps before the run was resumed.
        """
        if ago >= len(self._losses):
            return []
        is_bad = not bool(self._losses[-1 - ago].isfinite())
        return [rank for rank, bad in enumerate(self.world.gather(is_bad)) if bad]

    def restart(self, earlier: tuple[float, ...]) -> None:
        """Forget everything but these losses."""
        self.earlier, self._losses, self._last = earlier, [], None

    def read(self, model: JEPA | MAE) -> Interval:
        """What the last step shows, and begin a new interval."""
        assert self._last is not None, "read after at least one step"
        step, batch = self._last
        masks = batch.masks
        features = model.watched(step, batch.images)  # [b, n, D]
        tokens = features.flatten(0, 1)[:RANK_TOKENS]  # [B n, D]
        predicted = step.prediction.flatten(0, -2)  # [M B P, D]
        measures = torch.stack(
            [
                token_std(features).double(),
                between_image_std(features).double(),
                rankme(tokens).double(),
                prediction_std(step.prediction).double(),
                rankme(predicted[:RANK_TOKENS]).double(),
            ]
        )
        *signs, prediction_rankme = measures.tolist()
        images = masks.targets.shape[1]
        steps = len(self._losses)
        self.earlier, self._losses = (), []
        return Interval(
            steps=steps,
            signs=CollapseSigns(*signs),
            prediction_rankme=prediction_rankme,
            context_tokens=masks.context.numel() / images,
            target_tokens=masks.targets.numel() / images,
        )
