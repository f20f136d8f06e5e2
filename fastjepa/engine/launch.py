"""Engines: everything between a network and something that can step it."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn

import fastjepa_kernels as fk
from fastjepa.config import Config, ConfigError, merged
from fastjepa.engine.build import build_shape
from fastjepa.engine.processes.world import World
from fastjepa.engine.protocol import Engine
from fastjepa.engine.single import SingleDevice
from fastjepa.engine.zero import start_zero


def micro_batch(config: Config, world_size: int) -> int:
    """Images per rank and forward pass.

    Raises:
        ConfigError: the global batch does not divide.
    """
    shares = world_size * config.speed.accumulation
    batch = config.optim.global_batch
    if batch % shares:
        below = batch // shares * shares
        nearest = f"{below} or {below + shares}" if below else f"{shares}"
        raise ConfigError(
            f"optim.global_batch {batch} does not divide into {world_size} ranks x "
            f"{config.speed.accumulation} micro-batches (speed.accumulation): use {nearest}, or change those"
        )
    return batch // shares


def parameter_groups(network: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Groups in a fixed order: encoder decayed and not, then the rest decayed and not.

    Biases and one-dimensional parameters are not decayed, as published. The encoder has groups of its own,
    so that under ZeRO its master is contiguous and the target encoder can follow it.
    """
    groups = []
    for of_encoder in (True, False):
        members = [p for n, p in network.named_parameters() if n.startswith("encoder.") == of_encoder]
        for decayed in (True, False):
            chosen = [p for p in members if (p.ndim > 1) == decayed]
            if chosen:
                groups.append({"params": chosen, "weight_decay": weight_decay * decayed, "decayed": decayed})
    return groups


# DeepSpeed's own bucket of 5e8 elements holds a whole ViT-L: no gradient would be sent before the last is
# there. Of so many blocks ViT-B has 28M elements, ViT-H 79M: enough for a network, at most a third of all.
_BLOCKS_PER_BUCKET = 4


def bucket_elements(width: int) -> int:
    """Gradients that are reduced together: of a few blocks, each of about 12 width^2 elements."""
    return _BLOCKS_PER_BUCKET * 12 * width**2


def zero_stage(config: Config) -> int:
    """What DeepSpeed is asked for.

    Stage 2 sends gradients while the backward pass goes on, but after each micro-batch; stage 1 once a step,
    in bf16 when all are there.
    """
    if config.speed.zero_stage != "auto":
        return config.speed.zero_stage
    return 2 if config.speed.accumulation == 1 else 1


def deepspeed_config(config: Config, world_size: int, on_gpu: bool = False) -> dict[str, Any]:
    """The generated DeepSpeed configuration, with the file's own `deepspeed` section merged last.

    Args:
        config: of the run.
        world_size: ranks.
        on_gpu: where there are streams, on which gradients are reduced while others are computed.
    """
    bf16 = config.optim.precision == "bf16"
    stage = zero_stage(config)
    if bf16 and stage == 0 and config.speed.accumulation > 1 and world_size > 1:
        raise ConfigError(
            "bf16 with speed.zero_stage 0 on several ranks would sum the gradients of micro-batches in bf16 "
            "and lose bits: use speed.zero_stage 1, or speed.accumulation 1"
        )
    generated: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": micro_batch(config, world_size),
        "gradient_accumulation_steps": config.speed.accumulation,
        "train_batch_size": config.optim.global_batch,
        "gradient_clipping": config.optim.clip_grad,
        "zero_optimization": _zero(config, stage, on_gpu),
        "zero_force_ds_cpu_optimizer": False,  # torch's fused AdamW is as fast there, and is compiled already
        "bf16": {"enabled": bf16},
        "steps_per_print": None,
    }
    if bf16 and stage > 0:
        generated["data_types"] = {"grad_accum_dtype": "fp32"}
    return merged(generated, config.deepspeed)


def _zero(config: Config, stage: int, on_gpu: bool) -> dict[str, Any]:
    bucket = bucket_elements(build_shape(config).width)
    zero: dict[str, Any] = {
        "stage": stage,
        "reduce_bucket_size": bucket,
        "allgather_bucket_size": bucket,
        # A replayed backward pass writes again where another stream may still be reducing.
        "overlap_comm": on_gpu and stage > 0 and config.speed.cuda_graph != "parts",
    }
    if config.speed.offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": on_gpu}
    if stage == 3:
        zero |= {
            "stage3_prefetch_bucket_size": bucket,
            "stage3_max_live_parameters": 2 * bucket,
            # Farther from its next use a weight is let go; by default a billion, so a ViT-L would stay whole.
            "stage3_max_reuse_distance": bucket,
            "stage3_param_persistence_threshold": 0,
        }
    return zero


def is_single(config: Config, world: World) -> bool:
    """Whether training needs no DeepSpeed: one device, and nothing to be cut."""
    return is_alone(config, world.size)


def is_alone(config: Config, world_size: int) -> bool:
    """`is_single` before there is a world."""
    # A section of its settings is for it to be used.
    stages = ("auto", 0) if not config.deepspeed else (0,)
    return world_size == 1 and config.speed.zero_stage in stages


def preferred_kernels(config: Config) -> AbstractContextManager[None]:
    """Within it every op runs as `speed.kernels` says; auto leaves FASTJEPA_KERNELS its say."""
    kernels = config.speed.kernels
    return nullcontext() if kernels == "auto" else fk.use(kernels)


def start_engine(network: nn.Module, config: Config, world: World) -> Engine:
    """What steps `network` with AdamW; schedules set its rates at every step.

    Raises:
        ConfigError: DeepSpeed is needed, and not installed.
    """
    optim = config.optim
    groups = parameter_groups(network.to(world.device), optim.weight_decay)
    if is_single(config, world):
        return SingleDevice(
            network,
            groups,
            dtype=torch.bfloat16 if optim.precision == "bf16" else torch.float32,
            betas=optim.betas,
            eps=optim.eps,
            clip=optim.clip_grad,
            accumulation=config.speed.accumulation,
        )
    settings = deepspeed_config(config, world.size, on_gpu=world.device.type == "cuda")
    return start_zero(network, groups, optim, settings, world, compiles=config.speed.compile)
