"""Steps of fastjepa's engine: all that this benchmark knows of it."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import cast
from unittest import mock

import torch
import torch.distributed as dist
from torch import nn

from bench.throughput.setting import Inputs, Seen
from fastjepa.config import Config
from fastjepa.data.loader import Batch
from fastjepa.engine import build
from fastjepa.engine.learner import Learner, start_learner
from fastjepa.engine.processes.world import World
from fastjepa.engine.schedules import Rates
from fastjepa.models import Init, initialise

RATES = Rates(lr=1e-4, weight_decay=0.05, momentum=0.996)

# A fastjepa without any of its switches, and what each of them is alone. Budget masks, so that all can be.
PLAIN = (
    "masks.mode=budget",
    "speed.fused_blocks=false",
    "speed.skip_dead_work=false",
    "speed.compile=false",
    "speed.cuda_graph=none",
    "speed.target_stream=false",
    "speed.fused_update=false",
)
SWITCHES = {
    "fused_blocks": ("speed.fused_blocks=true",),
    "skip_dead_work": ("speed.skip_dead_work=true",),
    "fused_update": ("speed.fused_update=true",),
    "target_stream": ("speed.target_stream=true",),
    "target_precision=fp8": ("speed.target_precision=fp8",),
    "cuda_graph=step": ("speed.cuda_graph=step",),
    "compile": ("speed.compile=true",),
}
# Whatever changes no result; a graph of the whole step where there is a GPU.
QUICKEST = (
    "speed.fused_blocks=true",
    "speed.skip_dead_work=true",
    "speed.fused_update=true",
    "speed.cuda_graph=auto",
)
GPU_ALONE = {
    override
    for name in ("target_stream", "target_precision=fp8", "cuda_graph=step")
    for override in SWITCHES[name]
}


def world(device: torch.device) -> World:
    """This one process, which at stage 0 has nobody to talk to: no group of processes is made."""
    here = torch.device("cuda", torch.cuda.current_device()) if device.type == "cuda" else device
    return World(rank=0, size=1, device=here, hosts=cast(dist.ProcessGroup, None))


@contextmanager
def drawn_on(device: torch.device) -> Iterator[None]:
    """Make models where they are to be: drawing a billion weights on the host takes many seconds."""

    def draw(model: nn.Module, scheme: Init, _host: torch.Generator) -> None:
        initialise(model, scheme, torch.Generator(device).manual_seed(0))

    with mock.patch.object(build, "initialise", draw), torch.device(device):
        yield


def learner_of(config: Config, device: torch.device) -> Learner:
    with drawn_on(device):
        model = build.build_model(config)
    return start_learner(model, config, world(device))


def batches_of(config: Config, inputs: Inputs) -> list[Batch]:
    """What the loader would give, already on the device."""
    name: Seen = "mae" if config.objective.name == "mae" else config.masks.mode
    masks, pixels = inputs.masks(name), inputs.pixels
    return [
        Batch(pixels[i % len(pixels)], index, masks[i], epoch=0, step=i, unreadable={})
        for i, index in enumerate(inputs.image_index(name))
    ]


def steps_of(overrides: tuple[str, ...], inputs: Inputs) -> Callable[[int], object]:
    """A function that runs step i of a fresh learner."""
    config = inputs.setting.config(*overrides)
    learner, batches = learner_of(config, inputs.setting.device), batches_of(config, inputs)
    if config.speed.target_precision == "fp8" and getattr(learner.model, "fp8", None) is None:
        raise RuntimeError("this device has no fp8: the target encoder would run in bf16")

    def step(number: int) -> object:
        loss, _ = learner.step([batches[number % len(batches)]], RATES)
        return loss

    return step
