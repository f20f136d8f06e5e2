"""What a configuration asks of this host, and whether the trainer would take it."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch

from fastjepa.config import Config, ConfigError
from fastjepa.data.shards.store import is_url
from fastjepa.diagnosis import patience
from fastjepa.diagnosis.facts import Wants
from fastjepa.diagnosis.finding import Finding
from fastjepa.engine.build import (
    build_augmentation,
    build_masks,
    build_order,
    build_reading,
    build_schedule,
)
from fastjepa.engine.images import RunImages, open_images
from fastjepa.engine.launch import deepspeed_config, micro_batch
from fastjepa.engine.processes.world import World
from fastjepa.engine.speed import check_speed
from fastjepa.engine.tracking import check_tracking
from fastjepa.planning.networks import network_of

T = TypeVar("T")


@dataclass(frozen=True)
class Asked:
    """Attributes:
    images: that the configuration names; None if they cannot be opened.
    steps: of the run; None without images, if it is counted in epochs.
    findings: what the trainer would refuse, or one that says it would refuse nothing.
    """

    images: RunImages | None
    steps: int | None
    findings: tuple[Finding, ...]


def try_config(config: Config, ranks: int, device: torch.device) -> Asked:
    """Do what the trainer does before it writes anything."""
    findings: list[Finding] = []

    def attempt(build: Callable[[], T]) -> T | None:
        try:
            return build()
        except patience.NoAnswerError:
            findings.append(_not_opened(config))
        except ConfigError as error:
            findings.append(Finding("fail", "configuration", str(error)))
        except Exception as error:  # a drive or a store that fails as it likes
            findings.append(Finding("fail", "configuration", f"{type(error).__name__}: {error}"))
        return None

    images = attempt(lambda: patience.within(patience.PATIENCE_S, lambda: open_images(config)))
    steps = config.optim.steps
    attempt(lambda: build_masks(config))
    attempt(lambda: build_augmentation(config))
    attempt(lambda: build_reading(config))
    if images is not None:
        order = attempt(lambda: build_order(config, len(images.train), images.shard_ends))
        if order is not None:
            schedule = attempt(lambda: build_schedule(config, order.steps_per_epoch))
            steps = steps if schedule is None else schedule.steps
    world = World(0, ranks, device, None)
    attempt(lambda: check_speed(config, world))
    attempt(lambda: check_tracking(config.run.track))
    if not findings:  # the next would say the same again
        attempt(lambda: deepspeed_config(config, ranks))
    if not findings and images is not None:
        what = f"{len(images.train):,} training images, {steps:,} steps; {images.note}"
        findings.append(Finding("ok", "configuration", what))
    return Asked(images, steps, tuple(findings))


def _not_opened(config: Config) -> Finding:
    """Images that are not there in time: of a folder that does answer, there may be many."""
    roots = [root for root in (config.data.root, config.data.probe_root) if root]
    what = f"the images are not open after {patience.PATIENCE_S:g} s"

    def look() -> None:
        for root in roots:
            if not is_url(root):
                next(os.scandir(root), None)

    try:
        patience.within(1.0, look)
    except (patience.NoAnswerError, OSError):
        pass
    else:
        if not any(map(is_url, roots)):
            what = f"{what}, though their folder answers: so long is what every start of a run would wait"
            return Finding(
                "warn", "configuration", what, "fastjepa data pack makes shards, which open at once"
            )
    do = f"do {' and '.join(roots)} answer, their server, drive and network?"
    return Finding("fail", "configuration", what, do)


def wants_of(config: Config, ranks: int, steps: int | None) -> Wants:
    """What it asks of a host of so many ranks, by its shapes alone.

    Args:
        config: of the run.
        ranks: on this host, which are all there are.
        steps: of the run, if they are known: without them no checkpoint is taken to stay for ever.

    Raises:
        ConfigError: the batch does not divide, or there are no such networks.
    """
    run, data, speed = config.run, config.data, config.speed
    network = network_of(config)
    averaged = 0 if network.is_mae else network.encoder_parameters
    for_ever = (steps or 0) // run.keep_every if run.keep_every else 0
    micro = micro_batch(config, ranks)
    root = data.root if data.name == "shards" else None
    return Wants(
        ranks=ranks,
        device=speed.device,
        precision=config.optim.precision,
        fp8=speed.target_precision == "fp8",
        kernels=speed.kernels,
        needs_deepspeed=speed.zero_stage not in ("auto", 0) or bool(config.deepspeed),
        workers=speed.workers,
        micro_batch=micro,
        decodes=data.name != "fashion_mnist",
        decoder=speed.decoder,
        augment=speed.augment,
        remote=root.partition("://")[0] if root is not None and is_url(root) else None,
        is_packed=data.name == "shards",
        batch_bytes=micro * data.channels * data.image_size**2,
        # Weights and two moments, and the average; fp32.
        checkpoint_bytes=4 * (3 * network.parameters + averaged),
        keep_last=run.keep_last,
        kept=run.keep_last + for_ever,
        save_every_images=run.save_every * config.optim.global_batch,
    )
