"""Training small models, several on one device at once.

A small model is bound by launches, so on CUDA a lane's whole step (choosing its images and masks, forward,
backward, AdamW, target) is one graph. All it sees is on the device, the number of the step too: the host
only replays. Each lane has a stream of its own, so that the kernels of several runs, none of which fills a
GPU, run side by side. Several processes could not do that: they are given slices of its time in turn.
"""

import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from bench.accuracy.plan import Draw
from fastjepa.config import Config
from fastjepa.engine.build import build_model
from fastjepa.evaluation import pool_features
from fastjepa.masks import Masks
from fastjepa.models import VisionTransformer
from fastjepa.objectives import JEPA, MAE

ROUNDS = 64  # parts of a run, between which lanes wait for each other and may be probed
_WARM_UP = 3  # steps before a capture, in which kernels are compiled and moments made
_FEATURES_AT_ONCE = 1000  # images


class Lane:
    """One model of an objective, its optimizer, and all that a run of it sees. Run after run takes its place.

    Args:
        config: of the runs; their seed and length may differ.
        images: uint8 [N, 1, H, W], of the shape of the training images.
        capacity: the most steps of a run.
        device: where it trains.
        example: a draw of one step or more, which the tables take their shapes from.
    """

    def __init__(
        self, config: Config, images: Tensor, capacity: int, device: torch.device, example: Draw
    ) -> None:
        self.device, self.objective = device, config.objective.name
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.steps = self.done = 0
        self.graph: torch.cuda.CUDAGraph | None = None
        wait_for(device)
        with self.on_stream():
            self.images = images.to(device, copy=True)
            self.rows, self.context, self.targets = (
                torch.from_numpy(part[:1]).to(device).repeat(capacity, *[1] * (part.ndim - 1))
                for part in example
            )
            self.rates = torch.zeros(3, capacity, device=device)
            self.at = torch.zeros(1, dtype=torch.int64, device=device)
            self.loss = torch.zeros((), device=device)
            self.lr = torch.zeros((), device=device)
            self.model: JEPA | MAE = build_model(config).to(device)
            self.network = self.model.trainable()
            weights = list(self.network.parameters())
            self.decayed: list[Tensor] = [weight for weight in weights if weight.ndim > 1]
            # Weight decay is ours: a fused AdamW cannot read it from the device.
            self.optimizer = torch.optim.AdamW(
                weights,
                lr=self.lr,
                betas=config.optim.betas,
                eps=config.optim.eps,
                weight_decay=0.0,
                fused=True,
                capturable=device.type == "cuda",
            )
            if self.stream is not None:
                self._capture()

    def on_stream(self) -> AbstractContextManager[object]:
        return nullcontext() if self.stream is None else torch.cuda.stream(self.stream)

    @property
    def encoder(self) -> VisionTransformer:
        """What is judged: the target encoder of JEPA, the encoder of MAE."""
        return self.model.target_encoder if isinstance(self.model, JEPA) else self.model.encoder

    def start(self, config: Config, images: Tensor, draws: Sequence[Draw], rates: Tensor) -> None:
        """Take up a run from its first step: initial weights by its seed, its images, masks and rates.

        Args:
            config: with the seed.
            images: uint8 [N, 1, H, W].
            draws: in order, of all its steps.
            rates: fp32 [3, S].
        """
        self.steps, self.done = rates.shape[1], 0
        wait_for(self.device)  # the images were made on another stream
        with self.on_stream(), torch.no_grad():
            self.model.load_state_dict(build_model(config).state_dict())
            for moments in self.optimizer.state.values():
                for moment in moments.values():
                    moment.zero_()
            self.images.copy_(images)
            self.rates[:, : self.steps].copy_(rates)
            self.at.zero_()
            first = 0
            for part in draws:
                last = first + len(part.rows)
                for table, values in zip((self.rows, self.context, self.targets), part, strict=True):
                    table[first:last].copy_(torch.from_numpy(values))
                first = last
        wait_for(self.device)  # and their memory may be given to others now

    def advance(self) -> None:
        """One step; on CUDA it is only queued."""
        self.done += 1
        if self.graph is None:
            with self.on_stream():
                self._step()
        else:
            with self.on_stream():
                self.graph.replay()

    def features(self, images: Tensor) -> Tensor:
        """fp32 [n, D] on the host: the mean over patches of uint8 images [n, 1, H, W] on the device."""
        with self.on_stream():
            return features(self.encoder, images)

    def _step(self) -> None:
        rows, context, targets = (
            table.index_select(0, self.at)[0] for table in (self.rows, self.context, self.targets)
        )
        lr, decay, momentum = self.rates.index_select(1, self.at)[:, 0].unbind()
        self.lr.copy_(lr)
        masks = Masks(context.long(), targets.long())
        out = self.model.step(self.network, self.images.index_select(0, rows), masks)
        self.optimizer.zero_grad(set_to_none=True)
        out.loss.backward()
        with torch.no_grad():
            torch._foreach_mul_(self.decayed, 1 - lr * decay)
        self.optimizer.step()
        if isinstance(self.model, JEPA):
            self.model.update_target(momentum)
        self.loss.copy_(out.loss.detach())
        self.at += 1

    def _capture(self) -> None:
        """Make a graph of the step, or leave it to be launched kernel by kernel and say so."""
        for _ in range(_WARM_UP):
            self._step()
            self.at.zero_()
        torch.cuda.synchronize(self.device)
        self.optimizer.zero_grad(set_to_none=True)  # the graph shall make gradients of its own
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, stream=self.stream, capture_error_mode="thread_local"):
                self._step()
        except Exception as error:  # torch says it in many classes of error
            torch.cuda.synchronize(self.device)
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            warnings.warn(
                f"{self.objective}: no CUDA graph, so its kernels are launched: {reason}", stacklevel=2
            )
        else:
            self.graph = graph


@torch.no_grad()
def features(encoder: VisionTransformer, images: Tensor) -> Tensor:
    """fp32 [n, D] on the host: the mean over the patches, without a class token, after the final norm."""
    first = int(encoder.shape.class_token)
    batches = ((part, torch.zeros(len(part))) for part in images.split(_FEATURES_AT_ONCE))
    return pool_features(lambda part: encoder(part)[:, first:], batches, images.device)[0].cpu()


def train(lanes: Sequence[Lane], after_round: Callable[[int, Lane], None]) -> None:
    """Take all lanes through their runs together; `after_round(r, lane)` once r of ROUNDS are done."""
    for part in range(1, ROUNDS + 1):
        goals = [lane.steps * part // ROUNDS for lane in lanes]
        while any(lane.done < goal for lane, goal in zip(lanes, goals, strict=True)):
            for lane, goal in zip(lanes, goals, strict=True):
                if lane.done < goal:
                    lane.advance()
        for lane in lanes:
            after_round(part, lane)


def step_seconds(lane: Lane, budget_s: float) -> float:
    """Seconds of a step with the device to itself: the median over ten stretches of `budget_s` together.

    The lane's rates are zero before its first run, so its weights stay.
    """

    def stretch(steps: int) -> float:
        with lane.on_stream():
            lane.at.zero_()
        wait_for(lane.device)
        start = time.perf_counter()
        for _ in range(steps):
            lane.advance()
        wait_for(lane.device)
        return (time.perf_counter() - start) / steps

    stretch(2)
    once = stretch(2)
    steps = min(max(1, round(budget_s / 10 / once)), lane.rates.shape[1])
    return float(torch.tensor([stretch(steps) for _ in range(10)]).median())


def wait_for(device: torch.device) -> None:
    """Until all that was queued is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def step_flop(config: Config, images: Tensor, example: Draw) -> int:
    """FLOPs of one step's forward and backward passes, the target encoder's too, as torch counts them."""
    model = build_model(config)
    rows, context, targets = (torch.from_numpy(part[0]).long() for part in example)
    with FlopCounterMode(display=False) as counter:
        model.step(model.trainable(), images[rows], Masks(context, targets)).loss.backward()
    return counter.get_total_flops()
