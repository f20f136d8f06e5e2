"""What the losses of a run say: which steps were bad, on which images, and whether there is a spike."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from fastjepa.config import Config
from fastjepa.data.order import GlobalOrder, rank_slice
from fastjepa.data.views import ImageSet
from fastjepa.engine.checkpoints.checkpoint import Position
from fastjepa.engine.console import RunConsole
from fastjepa.engine.processes.stopping import NonFinite
from fastjepa.engine.processes.world import World
from fastjepa.engine.recorder import Recorder
from fastjepa.engine.spikes import KEPT, Spike, find_spike

NAMED = 4  # images in a message


@dataclass
class LossWatch:
    """Reads the losses since the last log line. Every rank must call its methods.

    Attributes:
        last_good: a sentence that points to the newest checkpoint.
    """

    config: Config
    world: World
    console: RunConsole
    images: ImageSet
    order: GlobalOrder
    recorder: Recorder
    last_good: Callable[[], str]
    _told: int = 0  # bad steps up to this one were told of

    def since_log(self, position: Position) -> tuple[float, ...]:
        """Those losses; of bad ones, which are no numbers, it tells once.

        Raises:
            NonFinite: `run.max_bad_steps` in a row are bad.
        """
        losses = self.recorder.losses()
        first = position.step - len(losses) + 1
        for step, loss in enumerate(losses, start=first):
            if not math.isfinite(loss) and step > self._told:
                self._told = step
                self.console.warn(f"step {step}: the loss is not finite, on {self._images(position, step)}")
        count = self.config.run.max_bad_steps
        earlier = position.recent[max(0, len(position.recent) - count + 1) :]
        bad = bad_in_a_row([*earlier, *losses], count)
        if bad is not None:
            self._give_up(position, first - len(earlier) + bad)
        return losses

    def heed_skip(self, position: Position, step: int, in_a_row: int) -> None:
        """Of a step without finite gradients, which changed nothing.

        Raises:
            NonFinite: it is one of `run.max_bad_steps` in a row.
        """
        self._told = max(self._told, step)
        self.console.warn(
            f"step {step}: the gradients are not finite; the weights stay as they were. It was on "
            f"{self._images(position, step)}"
        )
        if in_a_row >= self.config.run.max_bad_steps:
            self._give_up(position, step - in_a_row + 1)

    def find_spike(self, position: Position, losses: Sequence[float]) -> tuple[Position, Spike | None]:
        """A spike that the losses since the last log line show; the position with them as earlier ones."""
        known = (*position.recent, *losses)
        position = replace(position, recent=known[-KEPT:])
        if self.config.run.on_spike == "ignore":
            return position, None
        spike = find_spike(known, position.step, position.spike)
        return position if spike is None else replace(position, spike=spike.step), spike

    def go_back(self, position: Position) -> None:
        """Begin again at a position of the same run."""
        self.recorder.restart(position.losses)
        self._told = position.step

    def _give_up(self, position: Position, first: int) -> None:
        count, images = self.config.run.max_bad_steps, self._images(position, first)
        losses = self.recorder.losses()
        loss = losses[first - position.step - 1] if position.step - first < len(losses) else math.nan
        if math.isfinite(loss):
            what = f"the gradients were not finite in {count} steps in a row, from step {first} on: {images}"
        else:
            what = f"the loss is not finite at step {first}, on {images}: the first of {count} bad steps"
        raise NonFinite(
            f"{what}. {self.last_good()} A lower optim.lr, a longer warm-up or optim.clip_grad may help."
        )

    def _images(self, position: Position, step: int) -> str:
        """The images of a step, counted from 1: of the ranks whose loss is no number, if that is known."""
        _, index = self.order.batch(step - 1 + position.passed_over)
        ranks = self.recorder.bad_ranks(position.step - step)
        if ranks:
            share = (self.world.size, self.config.speed.accumulation)
            parts = [rank_slice(index, rank, *share).flatten().tolist() for rank in ranks]
            chosen = [image for part in parts for image in part]
        else:
            chosen = index.tolist()
        named = ", ".join(self.images.path(image) for image in chosen[:NAMED])
        return f"the images {named}" + (f" and {len(chosen) - NAMED} more" if len(chosen) > NAMED else "")


def bad_in_a_row(losses: Sequence[float], count: int) -> int | None:
    """Where `count` losses in a row that are no numbers begin, if they do; the last such place."""
    for begin in range(len(losses) - count, -1, -1):
        if not any(map(math.isfinite, losses[begin : begin + count])):
            return begin
    return None
