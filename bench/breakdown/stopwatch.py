"""Times the parts of a learner's step by marks on the device's stream, without changing what it computes."""

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal
from unittest import mock

import torch
from torch import Tensor

from bench.throughput.gauges import wait_for
from fastjepa.engine.learner import Learner
from fastjepa.engine.target import ShardedTarget
from fastjepa.objectives import JEPA

Moment = torch.cuda.Event | float
# In the order of a step. What is in none of the others is "rest"; a part's time is without those inside it.
PARTS = (
    "target patches",
    "target encoder",
    "context patches",
    "context encoder",
    "predictor",
    "loss",
    "predictor backward",
    "context backward",
    "optimizer",
    "average",
    "rest",
)


@dataclass
class Stopwatch:
    """Marks along a step; a mark on a GPU is an event, so the host does not wait."""

    device: torch.device
    marks: list[tuple[Literal["begin", "end", "turn"], str, Moment]] = field(default_factory=list)

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """What runs in the block is of this part, unless it is of one within."""
        self._mark("begin", name)
        yield
        self._mark("end", name)

    def turn(self, name: str) -> None:
        """From here on the running part is another."""
        self._mark("turn", name)

    def _mark(self, what: Literal["begin", "end", "turn"], name: str) -> None:
        moment: Moment
        if self.device.type == "cuda":
            moment = torch.cuda.Event(enable_timing=True)
            moment.record()
        else:
            moment = time.perf_counter()
        self.marks.append((what, name, moment))

    def seconds(self) -> dict[str, float]:
        """Of each part since the last call of this, which waits for the device."""
        wait_for(self.device)
        spent: dict[str, float] = {}
        running: list[str] = []
        before: Moment | None = None
        for what, name, moment in self.marks:
            if before is not None and running:
                spent[running[-1]] = spent.get(running[-1], 0.0) + _between(before, moment)
            before = moment
            if what == "begin":
                running.append(name)
            elif what == "end":
                running.pop()
            elif running:
                running[-1] = name
        self.marks.clear()
        return spent


def _between(start: Moment, end: Moment) -> float:
    if isinstance(start, torch.cuda.Event):
        assert isinstance(end, torch.cuda.Event), "marks of one watch are on one device"
        return start.elapsed_time(end) / 1e3
    assert isinstance(end, float), "marks of one watch are on one device"
    return end - start


@contextmanager
def watched(learner: Learner, watch: Stopwatch) -> Iterator[None]:
    """Within it the parts of the learner's steps are marked; what a CUDA graph replays cannot be."""
    model, engine = learner.model, learner.engine
    assert isinstance(model, JEPA), "the parts are those of I-JEPA"

    def of(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*arguments: Any, **keywords: Any) -> Any:
            with watch.part(name):
                return call(*arguments, **keywords)

        return timed

    encode = of("context encoder", model.encoder.forward)

    def encode_and_note(*arguments: Any, **keywords: Any) -> Tensor:
        context: Tensor = encode(*arguments, **keywords)
        if context.requires_grad:  # backward reaches it when the predictor's is done
            context.register_hook(lambda _gradient: watch.turn("context backward"))
        return context

    update = ShardedTarget.update
    with ExitStack() as stack:
        for owner, attribute, timed in (
            (model, "step", of("loss", model.step)),
            (model, "target_hidden", of("target encoder", model.target_hidden)),
            (model.target_encoder, "embed", of("target patches", model.target_encoder.embed)),
            (model.encoder, "embed", of("context patches", model.encoder.embed)),
            (model.encoder, "forward", encode_and_note),
            (model.predictor, "forward", of("predictor", model.predictor.forward)),
            (engine, "backward", of("predictor backward", engine.backward)),
            (engine, "step", of("optimizer", engine.step)),
            (learner, "step", of("rest", learner.step)),
        ):
            stack.enter_context(mock.patch.object(owner, attribute, timed))
        average = of("average", update)
        stack.enter_context(mock.patch.object(ShardedTarget, "update", lambda *given: average(*given)))
        yield
