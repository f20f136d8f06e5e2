"""A run before it is begun: what fits, and how long it would take. Predicted, never measured."""

from dataclasses import dataclass, replace
from typing import Any

from fastjepa.config import Config, ConfigError
from fastjepa.engine.build import build_masks, build_order, build_schedule
from fastjepa.engine.launch import bucket_elements, is_alone, micro_batch, zero_stage
from fastjepa.engine.speed import check_stage
from fastjepa.planning.fit import Parts, divisors, largest_that_fits, on_host, parts_of
from fastjepa.planning.memory import STAGES, Memory, Split, memory_of
from fastjepa.planning.networks import Network, network_of
from fastjepa.planning.tokens import Sampler, Tokens, most_seen_in, seen_in
from fastjepa.planning.work import Pace, Work, image_flop, pace

# On one H100 peaks were 1.16 to 1.27 times the bytes of tensors that are counted (bench/results/scale_model).
USABLE = 0.75


@dataclass(frozen=True)
class Device:
    """One of the GPUs.

    Attributes:
        memory: bytes of it.
        usable: the share of them that tensors may take.
        flop_per_s: dense bf16, at its best.
        mfu: useful FLOP/s over these.
    """

    memory: float
    flop_per_s: float
    mfu: float
    usable: float = USABLE

    @property
    def room(self) -> float:
        return self.memory * self.usable


@dataclass(frozen=True)
class Fit:
    """A micro-batch on each GPU at a ZeRO stage.

    Attributes:
        images: of it.
        accumulation: micro-batches of a step.
        parts: bytes of a GPU.
        host: bytes of the host's memory for each GPU.
        fits: into the room of the device.
    """

    stage: int
    images: int
    accumulation: int
    parts: Parts
    host: float
    fits: bool


@dataclass(frozen=True)
class Plan:
    """Attributes:
    network: that is trained.
    batch: images of each GPU in a step.
    fits: for each stage the largest micro-batch that fits, or one image that does not.
    stage: of them, the one that a run would take.
    configured: what the configuration itself says; None where it does not divide.
    """

    config: Config
    gpus: int
    device: Device
    network: Network
    batch: int
    fits: dict[int, Fit]
    stage: int
    configured: Fit | None
    work: Work
    pace: Pace

    @property
    def chosen(self) -> Fit:
        return self.fits[self.stage]


class DoesNotFit(ConfigError):
    """Not even one image fits; the message says what would."""


def make_plan(config: Config, gpus: int, device: Device, images: int, images_per_core_second: float) -> Plan:
    """What a run of `config` would take.

    Args:
        config: of it; where its images are need not be known.
        gpus: all alike.
        device: one of them.
        images: of the training set.
        images_per_core_second: that one core loads.

    Raises:
        DoesNotFit: one image on each GPU is too much.
        ConfigError: the batch does not divide among the GPUs, or the settings do not go together.
    """
    if config.optim.precision != "bf16":
        raise ConfigError(
            f"memory is planned for optim.precision bf16, got {config.optim.precision}: give "
            "optim.precision=bf16"
        )
    check_stage(config, is_alone(config, gpus))
    batch = micro_batch(_with_speed(config, accumulation=1), gpus)
    sampler = build_masks(config)
    configured = _configured(config, gpus, device, sampler)

    chosen = chosen_fit(config, gpus, device, sampler)
    if not chosen.fits:
        raise DoesNotFit(_why_not(config, gpus, chosen, device, sampler))
    others = STAGES[config.speed.offload_optimizer :] if gpus > 1 else [chosen.stage]
    fits = {stage: largest_fit(config, gpus, stage, device, sampler) for stage in others}

    network = network_of(config)
    schedule = build_schedule(config, build_order(config, images).steps_per_epoch)
    work = Work(
        image_flop(network, seen_in(sampler, chosen.images)), schedule.steps * config.optim.global_batch
    )
    at = pace(work, gpus, device.mfu * device.flop_per_s, images_per_core_second)
    return Plan(config, gpus, device, network, batch, fits, chosen.stage, configured, work, at)


def chosen_fit(config: Config, gpus: int, device: Device, sampler: Sampler) -> Fit:
    """The largest micro-batch at the stage that a run takes, which with auto depends on the micro-batches."""
    if is_alone(config, gpus) or config.speed.zero_stage != "auto":
        return largest_fit(config, gpus, _own_stage(config, gpus), device, sampler)
    at_once = largest_fit(config, gpus, 2, device, sampler)
    is_one = at_once.fits and at_once.accumulation == 1
    return at_once if is_one else largest_fit(config, gpus, 1, device, sampler)


def largest_fit(config: Config, gpus: int, stage: int, device: Device, sampler: Sampler) -> Fit:
    """The largest micro-batch that fits; one image where none does.

    Of stage 0 on several GPUs the whole batch is the only one: gradients in bf16 are not summed there.
    """
    batch = config.optim.global_batch // gpus
    sizes = [batch] if stage == 0 and gpus > 1 else divisors(batch)

    def fit_of(images: int) -> Fit:
        return _fit(config, gpus, stage, images, batch // images, device, sampler)

    found = largest_that_fits(sizes, lambda images: fit_of(images).parts.total, device.room)
    return fit_of(min(sizes) if found is None else found)


def _fit(
    config: Config,
    gpus: int,
    stage: int,
    images: int,
    accumulation: int,
    device: Device,
    sampler: Sampler,
) -> Fit:
    memory = _memory(config, gpus, stage, images, accumulation, sampler)
    memory, host = on_host(memory) if config.speed.offload_optimizer and stage else (memory, 0.0)
    parts = parts_of(memory)
    return Fit(stage, images, accumulation, parts, host, parts.total <= device.room)


def _memory(
    config: Config, gpus: int, stage: int, images: int, accumulation: int, sampler: Sampler
) -> Memory:
    network, speed = network_of(config), config.speed
    bucket = bucket_elements(network.shape.width)
    split = Split(stage, gpus, bucket, reuse=bucket, accumulates=accumulation > 1)
    tokens = Tokens(images, most_seen_in(sampler, images))
    fused = speed.fused_blocks and not speed.compile
    return memory_of(network, split, tokens, speed.checkpoint_blocks, fused)


def _configured(config: Config, gpus: int, device: Device, sampler: Sampler) -> Fit | None:
    batch, accumulation = config.optim.global_batch // gpus, config.speed.accumulation
    if batch % accumulation:
        return None
    stage = _own_stage(config, gpus)
    if stage == 0 and gpus > 1 and accumulation > 1:
        return None
    return _fit(config, gpus, stage, batch // accumulation, accumulation, device, sampler)


def _why_not(config: Config, gpus: int, least: Fit, device: Device, sampler: Sampler) -> str:
    """And which settings would help: each that does, else all of them together."""
    cuts = {"zero_stage": max(least.stage, 2 if gpus > 1 else 1), "offload_optimizer": True}
    single: list[dict[str, Any]] = [{"checkpoint_blocks": True}, cuts]
    if gpus > 1:
        single += [{"zero_stage": stage} for stage in (2, 3) if stage > least.stage]
    single = [each for each in single if _with_speed(config, **each) != config]
    together = {key: value for each in single for key, value in each.items()}
    helping = [said for each in single if (said := _helps(config, each, gpus, device, sampler))]
    helping = helping or [said for said in [_helps(config, together, gpus, device, sampler)] if said]
    return (
        f"it does not fit: a micro-batch of {least.images} at ZeRO {least.stage} needs "
        f"{least.parts.total / 1e9:.2f} GB of each GPU (predicted), and of its {device.memory / 1e9:g} GB "
        f"{device.room / 1e9:g} GB are for tensors (--usable {device.usable:g}). "
        + (
            f"Try {', or '.join(helping)}"
            if helping
            else "No setting helps: it needs more GPUs, or larger ones"
        )
    )


def _helps(config: Config, changes: dict[str, Any], gpus: int, device: Device, sampler: Sampler) -> str:
    """The settings, and what would fit with them; nothing where they do not help."""
    other = _with_speed(config, **changes)
    found = chosen_fit(other, gpus, device, sampler)
    keys = " ".join(f"speed.{key}={str(value).lower()}" for key, value in changes.items())
    return f"{keys} ({found.images} would take {found.parts.total / 1e9:.2f} GB)" if found.fits else ""


def _own_stage(config: Config, gpus: int) -> int:
    """That a run of the configuration takes as it is."""
    return 0 if is_alone(config, gpus) else zero_stage(config)


def _with_speed(config: Config, **changes: Any) -> Config:
    return replace(config, speed=replace(config.speed, **changes))
