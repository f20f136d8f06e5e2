"""How fast images come, measured with the loader that the trainer uses, and how fast the model eats them."""

import time
import warnings
from contextlib import closing
from dataclasses import replace

import torch

from fastjepa.config import Config
from fastjepa.data.loader import Batch, make_loader
from fastjepa.data.workers import NotWanted
from fastjepa.diagnosis.facts import Appetite, Loading
from fastjepa.diagnosis.finding import Finding
from fastjepa.engine.build import (
    build_augmentation,
    build_masks,
    build_model,
    build_order,
    build_reading,
    build_schedule,
)
from fastjepa.engine.images import RunImages
from fastjepa.engine.launch import micro_batch, preferred_kernels
from fastjepa.engine.learner import start_learner
from fastjepa.engine.processes.world import World
from fastjepa.planning.networks import network_of
from fastjepa.planning.tokens import seen_in
from fastjepa.planning.work import MFU, PEAKS, image_flop

H100_FLOP_PER_S = MFU * PEAKS["h100"]  # small networks reach less
CPU_SHARE = 0.5  # of the rate of a matrix product, that a step on a CPU is taken to reach
# Images that are read at a time: few, so that a slow drive gives some soon. From memory they come so fast
# that handing on a small batch would be all that is timed.
_BATCH, _IN_MEMORY = 16, 256
_MEASURE_S, _PATIENCE_S = 2.0, 20.0
_PATIENT_STEP_S = 1.0  # a step of a CPU that is taken to last longer is not tried
_WARM_STEPS, _MOST_STEPS, _DRAWN = 4, 100, 64


def try_loading(config: Config, images: RunImages) -> Loading | Finding:
    """What `measure_loading` measures, or why it cannot."""
    try:
        return measure_loading(config, images)
    except NotWanted:
        what = f"not {_BATCH} images were read within {_PATIENCE_S:g} s"
        return Finding("fail", "images/s", what, "is the drive that data.root is on still answering?")
    except Exception as error:  # of a drive, a store, an image or a worker
        what = f"the loader cannot read the training images ({type(error).__name__}: {error})"
        return Finding("fail", "images/s", what, "repair that first: training would stop at it")


def measure_loading(config: Config, images: RunImages) -> Loading:
    """Read training images for a few seconds: by one process, then by as many as the configuration says.

    Raises:
        NotWanted: no image came within 20 s.
        Exception: whatever the loader raises.
    """
    workers = config.speed.workers
    one_core = _images_per_second(config, images, min(1, workers), first_step=0)
    # Other images: those of before may be in the memory of the host by now.
    several = _images_per_second(config, images, workers, first_step=1000) if workers > 1 else one_core
    return Loading(one_core, several, workers, build_reading(config).decoder)


def _images_per_second(config: Config, images: RunImages, workers: int, first_step: int) -> float:
    few = _BATCH if images.train.images is None else _IN_MEMORY
    batch = min(few, config.optim.global_batch, len(images.train))
    small = replace(config, optim=replace(config.optim, global_batch=batch))
    deadline_s = time.monotonic() + _PATIENCE_S
    loader = make_loader(
        images.train,
        build_masks(config),
        build_order(small, len(images.train), images.shard_ends),
        size=config.data.image_size,
        augmentation=build_augmentation(config),
        seed=config.run.seed,
        first_step=first_step,
        workers=workers,
        worker_timeout_s=2 * _PATIENCE_S,
        should_stop=lambda: time.monotonic() > deadline_s,
        reading=build_reading(config),
    )
    with warnings.catch_warnings(), closing(loader):
        warnings.filterwarnings("ignore", "This DataLoader will create", UserWarning)
        for _ in range(workers):  # which begin at the same time, and so answer nearly at once
            next(loader)
        begin_s, read = time.perf_counter(), 0
        while True:
            next(loader)
            read += batch
            passed_s = time.perf_counter() - begin_s
            if passed_s >= _MEASURE_S:
                return read / passed_s


def appetite_of(config: Config, ranks: int, on_gpu: bool) -> tuple[Appetite, Finding | None]:
    """What a rank eats, and why that could not be measured where it should have been.

    On a CPU large models take minutes for a step, and then FLOPs must do.
    """
    micro = micro_batch(config, ranks)
    supposed = appetite_of_h100(config, ranks) if on_gpu else appetite_on_cpu(config, ranks)
    if not on_gpu and micro / supposed.images_per_second > _PATIENT_STEP_S:
        return supposed, None
    try:
        return measure_appetite(
            config, ranks, torch.device("cuda", 0) if on_gpu else torch.device("cpu")
        ), None
    except torch.OutOfMemoryError:
        what = f"{micro} images and all state of the model do not fit on one GPU alone"
        do = (
            "ZeRO shares the state of several; else raise speed.accumulation, or speed.checkpoint_blocks=true"
        )
        return supposed, Finding("warn", "GPU memory", what, do)
    except Exception as error:  # whatever a kernel, a compiler or a driver raises
        what = f"training fails ({type(error).__name__}: {str(error).partition(chr(10))[0]})"
        do = "if kernels are to blame, speed.kernels=torch goes without Triton's"
        return supposed, Finding("fail", "step", what, do)


def measure_appetite(config: Config, ranks: int, device: torch.device) -> Appetite:
    """Train for a few real steps on random pixels and drawn masks: one rank, alone, with all its state.

    Raises:
        Exception: whatever training raises; torch.OutOfMemoryError where it needs several GPUs.
    """
    micro = micro_batch(config, ranks)
    alone = replace(
        config,
        optim=replace(config.optim, global_batch=micro, epochs=None, steps=_MOST_STEPS, warmup_epochs=0.0),
        speed=replace(config.speed, zero_stage=0, accumulation=1, offload_optimizer=False),
        deepspeed={},
    )
    masks, data = build_masks(alone), alone.data
    pixels = torch.randint(
        256, (micro, data.channels, data.image_size, data.image_size), dtype=torch.uint8, device=device
    )  # [B, C, H, W]
    index = torch.arange(micro)
    rates = build_schedule(alone, 1).at(0)
    with preferred_kernels(alone):
        learner = start_learner(build_model(alone), alone, World(0, 1, device, None))

        def step(number: int) -> None:
            drawn = masks.sample(index, step=number).to(device, non_blocking=True)
            learner.step([Batch(pixels, index, drawn, 0, number, {})], rates)

        for number in range(_WARM_STEPS):
            step(number)
        _finish(device)
        begin_s, number = time.perf_counter(), _WARM_STEPS
        while number < _MOST_STEPS and time.perf_counter() - begin_s < _MEASURE_S:
            step(number)
            number += 1
        _finish(device)
    steps = number - _WARM_STEPS
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "the CPU"
    how = f"measured by {steps} real steps of {micro} images"
    return Appetite(steps * micro / (time.perf_counter() - begin_s), name, how)


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def useful_flop(config: Config, images: int) -> float:
    """Of one image in training, by the masks of micro-batches of so many."""
    return sum(image_flop(network_of(config), seen_in(build_masks(config), images)).values())


def appetite_on_cpu(config: Config, ranks: int) -> Appetite:
    """By its FLOPs, at half the rate of a matrix product that is timed here."""
    rate = CPU_SHARE * _matmul_flop_per_s(
        torch.bfloat16 if config.optim.precision == "bf16" else torch.float32
    )
    flop = useful_flop(config, min(_DRAWN, micro_batch(config, ranks)))
    at = f"{rate / 1e9:,.0f} GFLOP/s, half of a matrix product's"
    how = f"not measured: {flop / 1e9:.3g} GFLOP for each at {at}"
    return Appetite(rate / flop, "this CPU", how)


def appetite_of_h100(config: Config, ranks: int) -> Appetite:
    """By its FLOPs, at what networks of some size were measured to reach there."""
    flop = useful_flop(config, min(_DRAWN, micro_batch(config, ranks)))
    at = f"at {H100_FLOP_PER_S / 1e12:.0f} TFLOP/s, as large ones were measured to reach"
    return Appetite(H100_FLOP_PER_S / flop, "an H100", f"not measured: {flop / 1e9:.3g} GFLOP for each {at}")


def _matmul_flop_per_s(dtype: torch.dtype) -> float:
    side = 512
    left, right = torch.ones(side, side, dtype=dtype), torch.ones(side, side, dtype=dtype)
    left @ right
    begin_s, products = time.perf_counter(), 0
    while (passed_s := time.perf_counter() - begin_s) < 0.2:
        left @ right
        products += 1
    return 2 * side**3 * products / passed_s
