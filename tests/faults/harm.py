"""Run a training script in which one thing goes wrong that cannot be brought about from outside.

python harm.py HARM VALUE train.py [arguments …]

nan_gradient RANK:STEP,STEP…   on that rank the gradients of these steps, from 0, are not numbers
told RANK                      that rank is told to stop while it joins the others
"""

import os
import runpy
import signal
import sys
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch


def nan_gradient(value: str) -> None:
    from fastjepa.engine import learner

    rank, _, steps = value.partition(":")
    if int(rank) != int(os.environ.get("RANK", "0")):
        return
    bad = set(map(int, steps.split(",")))
    step = learner.Learner.step

    def harmed(self: Any, micro_batches: Iterable[Any], rates: Any) -> Any:
        micro_batches = list(micro_batches)
        if micro_batches[0].step not in bad:
            return step(self, micro_batches, rates)
        parameter = next(p for p in self.model.predictor.parameters() if p.requires_grad)
        hook = parameter.register_hook(lambda gradient: torch.full_like(gradient, float("nan")))
        try:
            return step(self, micro_batches, rates)
        finally:
            hook.remove()

    learner.Learner.step = harmed  # type: ignore[method-assign]


def rate(value: str) -> None:
    from fastjepa.engine import learner

    at, _, factor = value.partition(":")
    bad = {int(at)}
    step = learner.Learner.step

    def harmed(self: Any, micro_batches: Iterable[Any], rates: Any) -> Any:
        micro_batches = list(micro_batches)
        if micro_batches[0].step in bad:
            bad.clear()
            rates = replace(rates, lr=rates.lr * float(factor))
        return step(self, micro_batches, rates)

    learner.Learner.step = harmed  # type: ignore[method-assign]


def told(value: str) -> None:
    from fastjepa.engine.processes import world

    connect = world._connect

    def harmed(placement: Any, *given: Any) -> Any:
        os.kill(os.getpid(), signal.SIGUSR1)
        return connect(placement, *given)

    if value == os.environ["RANK"]:
        world._connect = harmed  # type: ignore[assignment]


if __name__ == "__main__":
    _, name, value, *sys.argv = sys.argv
    {"nan_gradient": nan_gradient, "rate": rate, "told": told}[name](value)
    script = sys.argv[0]
    sys.path[0] = os.path.dirname(script)
    runpy.run_path(script, run_name="__main__")
