"""The experiment: training on the device, here, and everything else in processes beside it."""

import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass, field
from multiprocessing import get_context
from typing import Any

import torch
from torch import Tensor

from bench.accuracy.corruptions import corrupt
from bench.accuracy.lanes import ROUNDS, Lane, features, step_flop, step_seconds, train
from bench.accuracy.plan import TRAINED, Condition, Draw, Task, config_of, draw, epochs_of, rates, tasks
from bench.accuracy.probes import judge, prepare_process
from bench.accuracy.store import Point, Result, Store
from fastjepa.config import Config
from fastjepa.data.fashion_mnist import FashionMNIST
from fastjepa.engine.build import build_model

Say = Callable[[str], None]
_MEASURED_STEPS = 1000  # at most, in a stretch that is timed


@dataclass(frozen=True)
class Asked:
    """What changes results.

    Attributes:
        configs: of each objective.
        seconds: of a run's training; None where `steps` is given.
        steps: of a run, for both objectives.
        bank, queries: images that probes learn from and are judged on.
    """

    configs: dict[str, Config]
    seconds: float | None
    steps: int | None
    bank: int
    queries: int

    def as_dict(self) -> dict[str, Any]:
        parts = {name: config.results_part() for name, config in self.configs.items()}
        return {
            "seconds": self.seconds,
            "steps": self.steps,
            "bank": self.bank,
            "queries": self.queries,
        } | parts


@dataclass(frozen=True)
class Images:
    """All images, on the device, and which of them are probed."""

    train: Tensor  # uint8 [N, 1, H, W]
    queries: Tensor  # uint8 [q, 1, H, W]
    query_numbers: Tensor  # int64 [q]: test image i has the number N + i
    bank: Tensor  # int64 [b], among the training images
    bank_labels: Tensor  # int64 [b], on the host
    query_labels: Tensor

    @classmethod
    def open(cls, bank: int, queries: int, device: torch.device) -> "Images":
        training, test = FashionMNIST(split="train"), FashionMNIST(split="test")
        rows, asked = _spread(len(training), bank), _spread(len(test), queries)
        return cls(
            training.images.to(device),
            test.images[asked].to(device),
            (len(training) + asked).to(device),
            rows.to(device),
            training.labels[rows],
            test.labels[asked],
        )

    def under(self, condition: Condition, seed: int) -> tuple[Tensor, Tensor]:
        """Training images and queries, both with the same kind of detail added."""
        if not condition.strength:
            return self.train, self.queries
        numbers = torch.arange(len(self.train), device=self.train.device)
        how = condition.kind, condition.strength, seed, self.train
        return corrupt(self.train, numbers, *how), corrupt(self.queries, self.query_numbers, *how)


def _spread(count: int, wanted: int) -> Tensor:
    wanted = min(count, wanted)
    return torch.arange(wanted) * count // wanted


@dataclass
class Open:
    """A task whose judgements are under way."""

    task: Task
    about: dict[str, Any] = field(default_factory=dict)
    judged: list[tuple[int, Future[dict[str, float | None]]]] = field(default_factory=list)
    closed: bool = False  # no more judgements will come

    @property
    def ready(self) -> bool:
        return self.closed and all(future.done() for _, future in self.judged)


class Experiment:
    """What all groups of runs share: images, processes, measured times, lanes."""

    def __init__(self, asked: Asked, store: Store, device: torch.device, jobs: int, say: Say) -> None:
        self.asked, self.store, self.device, self.say = asked, store, device, say
        self.images = Images.open(asked.bank, asked.queries, device)
        os.environ["OMP_NUM_THREADS"] = "1"  # of the processes that start now
        self.pool = ProcessPoolExecutor(jobs, get_context("spawn"), initializer=prepare_process)
        self.lanes: dict[str, list[Lane]] = {objective: [] for objective in TRAINED}
        self.draws: dict[tuple[str, int], list[Draw]] = {}
        self.open: list[Open] = []
        self.measured: dict[str, Any] = {}
        self.seen: dict[tuple[Condition, int], tuple[Tensor, Tensor]] = {}
        if device.type == "cuda":  # they load torch while the device is measured; on a CPU that would disturb
            for _ in range(jobs):
                self.pool.submit(int)

    def close(self) -> None:
        self.pool.shutdown(cancel_futures=True)

    def prepare(self, measured: dict[str, Any] | None, budget_s: float = 1.0) -> dict[str, Any]:
        """Seconds and FLOPs of a step and steps of a run, by objective; measured unless they are known."""
        if measured is None:
            measured = {name: self._measure(name, budget_s) for name in TRAINED}
        self.measured = measured
        return measured

    def _measure(self, objective: str, budget_s: float) -> dict[str, Any]:
        config = config_of(self.asked.configs[objective], 0, steps=1, images=len(self.images.train))
        example = draw(config, len(self.images.train), (0, 1))
        lane = Lane(config, self.images.train, _MEASURED_STEPS, self.device, example)
        seconds = step_seconds(lane, budget_s)
        steps = self.asked.steps or max(1, round((self.asked.seconds or 0.0) / seconds))
        how = "CUDA graph" if lane.graph else "launches"
        flop = step_flop(config, self.images.train.cpu(), example)
        self.say(f"{objective}: {1e3 * seconds:.2f} ms a step alone ({how}), {steps} steps in a run")
        return {"step_seconds": seconds, "step_flop": flop, "steps": steps, "how": how}

    def run(self, condition: Condition, seeds: Sequence[int], most_lanes: int) -> None:
        """All tasks of a condition that are not on disk; those that train go side by side."""
        self.seen.clear()
        left = [task for task in tasks(condition, seeds) if not self.store.has(task)]
        training = [task for task in left if task.learner in TRAINED]
        self._draw([(task.learner, task.seed) for task in training])
        self._judge_baselines([task for task in left if task.learner not in TRAINED])
        for first in range(0, len(training), most_lanes):
            self._train(training[first : first + most_lanes])
            self.collect()

    def collect(self, wait: bool = False) -> None:
        """Keep the results of tasks whose judgements are done; with `wait`, of all."""
        for one in list(self.open):
            if not (one.ready or (wait and one.closed)):
                continue
            points = [self._point(one.task, step, future.result()) for step, future in one.judged]
            self.store.save(
                Result(
                    one.task.learner,
                    one.task.seed,
                    one.task.condition.kind,
                    one.task.condition.strength,
                    points,
                    one.about,
                )
            )
            self.open.remove(one)
            last = points[-1]
            numbers = [
                f"{100 * x:.1f}" if x is not None else "diverged" for x in (last.linear_top1, last.knn_top1)
            ]
            self.say(f"{one.task}: linear {numbers[0]}  kNN {numbers[1]}")

    def _point(self, task: Task, step: int, judged: dict[str, float | None]) -> Point:
        cost = self.measured.get(task.learner, {"step_seconds": 0.0, "step_flop": 0})
        return Point(step, step * cost["step_seconds"], float(step * cost["step_flop"]), **judged)

    def _judge_baselines(self, left: Sequence[Task]) -> None:
        for task in left:
            training, queries = self._images(task)
            bank = training[self.images.bank]
            if task.learner == "pixels":
                both = bank.flatten(1).float() / 255, queries.flatten(1).float() / 255
            else:
                config = config_of(self.asked.configs["jepa"], task.seed, steps=1, images=len(training))
                encoder = build_model(config).encoder.to(self.device)
                both = features(encoder, bank), features(encoder, queries)
            one = Open(task, closed=True)
            one.judged.append((0, self._submit(task, *both)))
            self.open.append(one)

    def _images(self, task: Task) -> tuple[Tensor, Tensor]:
        key = task.condition, task.seed
        if key not in self.seen:
            self.seen[key] = self.images.under(*key)
        return self.seen[key]

    def _submit(self, task: Task, bank: Tensor, queries: Tensor) -> Future[dict[str, float | None]]:
        labels = self.images.bank_labels.numpy(), self.images.query_labels.numpy()
        return self.pool.submit(
            judge, bank.cpu().numpy(), labels[0], queries.cpu().numpy(), labels[1], task.seed
        )

    def _train(self, training: Sequence[Task]) -> None:
        start_s = time.monotonic()
        running: dict[int, tuple[Open, Lane, Tensor, Tensor]] = {}
        taken = dict.fromkeys(TRAINED, 0)
        for task in training:
            lane = self._lane(task.learner, taken[task.learner])
            taken[task.learner] += 1
            config = self._config(task.learner, task.seed)
            seen, queries = self._images(task)
            bank = seen[self.images.bank]  # made before the lane waits for all that is queued
            draws = self.draws[task.learner, task.seed]
            lane.start(config, seen, draws, rates(config, len(seen)))
            one = Open(task)
            self.open.append(one)
            running[id(lane)] = one, lane, bank, queries

        def after_round(part: int, lane: Lane) -> None:
            self.collect()  # what earlier runs have left open
            one, _, bank, queries = running[id(lane)]
            due = part in [max(1, round(ROUNDS * at)) for at in one.task.probe_at]
            if due and lane.done > (one.judged[-1][0] if one.judged else 0):
                submitted = self._submit(one.task, lane.features(bank), lane.features(queries))
                one.judged.append((lane.done, submitted))

        train([lane for _, lane, _, _ in running.values()], after_round)
        took_s = time.monotonic() - start_s
        for one, lane, _, _ in running.values():
            one.about = {"loss": float(lane.loss), "side_by_side": len(running), "wall_s": took_s}
            one.closed = True
        self.say(f"{training[0].condition}: trained {len(running)} side by side in {took_s:.1f} s")

    def _config(self, objective: str, seed: int) -> Config:
        steps = self.measured[objective]["steps"]
        return config_of(self.asked.configs[objective], seed, steps, len(self.images.train))

    def _draw(self, wanted: Sequence[tuple[str, int]]) -> None:
        """Masks and order of whole runs, epoch by epoch in the processes beside; alike in every condition."""
        count = len(self.images.train)
        coming: dict[tuple[str, int], list[Future[Draw]]] = {}
        for objective, seed in dict.fromkeys(wanted):
            if (objective, seed) not in self.draws:
                config = self._config(objective, seed)
                parts = [self.pool.submit(draw, config, count, steps) for steps in epochs_of(config, count)]
                coming[objective, seed] = parts
        for key, parts in coming.items():
            self.draws[key] = [part.result() for part in parts]

    def _lane(self, objective: str, place: int) -> Lane:
        lanes = self.lanes[objective]
        while len(lanes) <= place:
            config = self._config(objective, 0)
            example = draw(config, len(self.images.train), (0, 1))
            steps = self.measured[objective]["steps"]
            lanes.append(Lane(config, self.images.train, steps, self.device, example))
        return lanes[place]
