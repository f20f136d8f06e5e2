"""What `speed` says of the networks: how they compute, never what; and whether they can."""

import os
import warnings
from typing import Literal

import torch

import fastjepa_kernels as fk
from fastjepa.config import Config, ConfigError, possible_graphs
from fastjepa.engine.launch import is_single, micro_batch
from fastjepa.engine.processes.world import World
from fastjepa.models import Stack
from fastjepa.models.fp8 import Fp8Encoder
from fastjepa.objectives import JEPA, MAE


def is_debugged() -> bool:
    """Whether ops look at the values of their indices on a GPU too, for which the host waits."""
    return os.environ.get("FASTJEPA_DEBUG", "0") == "1"


def cuda_graph_of(config: Config, world: World) -> Literal["none", "parts", "step"]:
    """What is captured: what was asked for, or with auto the whole step where one graph can hold it."""
    speed = config.speed
    if speed.cuda_graph != "auto":
        return speed.cuda_graph
    whole = is_single(config, world) and world.device.type == "cuda" and "step" in possible_graphs(config)
    return "step" if whole and not speed.compile and not is_debugged() else "none"


def check_speed(config: Config, world: World) -> None:
    """Refuse what `speed` asks for and these processes and devices cannot do.

    Raises:
        ConfigError: saying what can be done instead.
    """
    speed = config.speed
    micro_batch(config, world.size)
    _check_graph(config, world)
    _check_target(config, world)
    check_stage(config, is_single(config, world))
    if is_single(config, world) and config.deepspeed:
        raise ConfigError(
            "at speed.zero_stage 0 on one device nothing runs under DeepSpeed, and the deepspeed section "
            f"would do nothing: use speed.zero_stage 1, or leave out {', '.join(config.deepspeed)}"
        )
    if speed.kernels != "auto":
        there = _implementations(world.device)
        if speed.kernels not in there:
            raise ConfigError(
                f"speed.kernels {speed.kernels}: no op has that implementation on {world.device.type} here; "
                f"there are {', '.join(there)}, and auto for the fastest measured of each op"
            )


def _check_graph(config: Config, world: World) -> None:
    speed, kind = config.speed, config.speed.cuda_graph
    if kind in ("auto", "none"):
        return
    if world.device.type != "cuda":
        raise ConfigError(
            f"speed.cuda_graph {kind} needs a GPU, and this trains on the {world.device.type.upper()}: "
            "use none"
        )
    if is_debugged():
        raise ConfigError(
            f"speed.cuda_graph {kind} cannot capture what FASTJEPA_DEBUG=1 does, which is to look at values "
            "on the device: use none, or unset FASTJEPA_DEBUG"
        )
    if is_single(config, world):
        return
    if kind == "step":
        instead = "parts or none" if "parts" in possible_graphs(config) else "none"
        raise ConfigError(
            f"speed.cuda_graph step is for one process at speed.zero_stage 0, this is one of {world.size} at "
            f"stage {speed.zero_stage}: use {instead}"
        )
    if config.optim.precision == "fp32" and speed.accumulation > 1:
        # Autograd keeps the tensor that it is given first as the gradient: memory of the graph, where the
        # next micro-batch's replay writes.
        raise ConfigError(
            f"speed.cuda_graph parts under DeepSpeed in fp32 would lose gradients of speed.accumulation "
            f"{speed.accumulation}: use speed.accumulation 1, optim.precision bf16, or speed.cuda_graph none"
        )


def check_stage(config: Config, is_alone: bool) -> None:
    """Refuse what a ZeRO stage cannot do; `is_alone` as of `is_alone`."""
    speed, stage = config.speed, config.speed.zero_stage
    if speed.offload_optimizer and (stage == 0 or is_alone):
        raise ConfigError(
            "speed.offload_optimizer keeps on the host what ZeRO cuts, and at stage 0 it cuts nothing: use "
            "speed.zero_stage 1, 2 or 3, or leave it out"
        )
    if stage != 3:
        return
    refused = {
        "compile true": speed.compile,  # a graph cannot wait for weights
        "cuda_graph parts": speed.cuda_graph == "parts",
        "target_precision fp8": speed.target_precision == "fp8",  # which wants all weights at once
    }
    for what, asked in refused.items():
        if asked:
            raise ConfigError(
                f"speed.{what} needs whole networks, and at speed.zero_stage 3 each block's weights come and "
                "go: use a lower stage, or leave it out"
            )


def _check_target(config: Config, world: World) -> None:
    speed = config.speed
    if config.objective.name == "mae":
        asked = {"target_stream": speed.target_stream, "target_precision": speed.target_precision != "auto"}
        for name, is_asked in asked.items():
            if is_asked:
                raise ConfigError(
                    f"speed.{name} is for the target encoder, and objective.name mae has none: leave it out"
                )
    if config.optim.precision == "fp32" and speed.target_precision != "auto":
        raise ConfigError(
            f"speed.target_precision {speed.target_precision} needs optim.precision bf16; beside an fp32 "
            "student the target encoder computes in fp32: leave it at auto"
        )
    if speed.target_stream and world.device.type != "cuda":
        raise ConfigError(
            f"speed.target_stream needs a GPU: there are no streams on the {world.device.type.upper()}; "
            "leave it out"
        )


def _implementations(device: torch.device) -> list[str]:
    """Those that any op of a training step has on a device."""
    ops = ("patchify_gather", "gather_tokens", "packed_attention", "jepa_loss", "adamw_ema_", "ema_update_")
    names = [name for op in ops for name in fk.implementations(op, device)]
    return [name for name in ("triton", "cuda", "cpp", "torch") if name in names]


def apply_speed(model: JEPA | MAE, config: Config, device: torch.device) -> None:
    """Set how the networks of `model` run, once they are on `device` and in their precision.

    Args:
        model: of the run.
        config: that `check_speed` has found nothing wrong with.
        device: where the model is.
    """
    speed = config.speed
    for module in model.modules():
        if isinstance(module, Stack):
            module.recompute = speed.checkpoint_blocks
            module.is_fused = speed.fused_blocks and not speed.compile
            if speed.compile:
                module.compile_blocks()
    if not isinstance(model, JEPA):
        return
    model.skip_dead_work = model.predictor.skip_dead_work = speed.skip_dead_work
    if speed.target_stream:
        model.target_stream = torch.cuda.Stream(device)
    if speed.target_precision == "fp8":
        model.fp8 = _fp8(model)


def _fp8(model: JEPA) -> Fp8Encoder | None:
    """None, with one warning, where the device has no fp8: results then come a little slower and truer."""
    try:
        return Fp8Encoder(model.target_encoder)
    except ValueError as error:
        warnings.warn(f"speed.target_precision fp8: {error}; the target encoder runs in bf16", stacklevel=2)
        return None
