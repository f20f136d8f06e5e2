"""Processes, devices and engines: everything between the command line and an engine that can step.

DeepSpeed is imported where an engine of its own is started, and nowhere else.
"""

import importlib
import io
import logging
import os
import socket
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext, redirect_stdout
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import nn

import fastjepa_kernels as fk
from fastjepa.config import Config, ConfigError
from fastjepa.engine.build import build_shape
from fastjepa.engine.protocol import Engine, ZeroEngine
from fastjepa.engine.single import SingleDevice
from fastjepa.engine.stopping import PeerFailed

T = TypeVar("T")
HOST_TIMEOUT = timedelta(hours=12)  # rank 0 judges and saves while the others wait


@dataclass(frozen=True)
class World:
    """This process among all."""

    rank: int
    size: int
    device: torch.device
    hosts: dist.ProcessGroup  # gloo, for decisions that must not wait for a device

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def worst(self, code: int) -> int:
        """The largest code that any rank gives."""
        if self.size == 1:
            return code
        tensor = torch.tensor([code])
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX, group=self.hosts)
        return int(tensor.item())

    def on_main(self, do: Callable[[], T]) -> T | None:
        """Run `do` on rank 0 while the others wait; if it fails there, every rank raises.

        Returns:
            Its result on rank 0, None elsewhere.
        """
        result, failure = None, None
        if self.is_main:
            try:
                result = do()
            except Exception as error:  # raised again below, once the others know
                failure = error
        if self.worst(int(failure is not None)):
            raise failure or PeerFailed("rank 0 could not go on; its message says why")
        return result

    def mean(self, values: torch.Tensor) -> torch.Tensor:
        """The mean over ranks of a tensor on the device."""
        if self.size > 1:
            dist.all_reduce(values)
        return values / self.size


def join_world(device: str) -> World:
    """Join the processes that a launcher started, or be the only one.

    Raises:
        ConfigError: CUDA was asked for and there is none.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("speed.device is cuda, but torch sees no CUDA device here; use auto or cpu")
    on_cuda = device != "cpu" and torch.cuda.is_available()
    if "RANK" not in os.environ:  # a bare `python`
        if int(os.environ.get("SLURM_NTASKS", "1")) > 1:
            raise ConfigError(
                "Slurm starts several tasks, but RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT "
                "are not set, so each would be a run of its own: let torchrun start the processes"
            )
        os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
        os.environ.setdefault("MASTER_PORT", str(_free_port()))
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    where = torch.device("cuda", local_rank) if on_cuda else torch.device("cpu")
    if on_cuda:
        torch.cuda.set_device(where)
    dist.init_process_group("nccl" if on_cuda else "gloo", timeout=HOST_TIMEOUT)
    hosts = cast(dist.ProcessGroup, dist.new_group(backend="gloo", timeout=HOST_TIMEOUT))
    return World(dist.get_rank(), dist.get_world_size(), where, hosts)


def leave_world() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


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


def deepspeed_config(config: Config, world_size: int, on_gpu: bool = False) -> dict[str, Any]:
    """The generated DeepSpeed configuration, with the file's own `deepspeed` section merged last.

    Args:
        config: of the run.
        world_size: ranks.
        on_gpu: where there are streams, on which gradients are reduced while others are computed.
    """
    bf16 = config.optim.precision == "bf16"
    stage = 1 if config.speed.zero_stage == "auto" else config.speed.zero_stage
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
        "zero_optimization": {
            "stage": stage,
            "reduce_bucket_size": bucket_elements(build_shape(config).width),
            "allgather_bucket_size": bucket_elements(build_shape(config).width),
            # A replayed backward pass writes again where another stream may still be reducing.
            "overlap_comm": on_gpu and stage > 0 and config.speed.cuda_graph != "parts",
        },
        "zero_allow_untested_optimizer": True,
        "bf16": {"enabled": bf16},
        "steps_per_print": None,
    }
    if bf16 and stage > 0:
        generated["data_types"] = {"grad_accum_dtype": "fp32"}
    return _merge(generated, config.deepspeed)


def _merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in over.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merge(merged[key], value) if both else value
    return merged


def is_single(config: Config, world: World) -> bool:
    """Whether training needs no DeepSpeed: one device, and nothing to be cut."""
    # A section of its settings is for it to be used.
    stages = ("auto", 0) if not config.deepspeed else (0,)
    return world.size == 1 and config.speed.zero_stage in stages


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
    deepspeed = _start_deepspeed(world)
    optimizer = torch.optim.AdamW(groups, lr=optim.lr, betas=optim.betas, eps=optim.eps, fused=True)
    with redirect_stdout(io.StringIO()):  # its bf16 optimizer prints memory figures past any log level
        engine, *_ = deepspeed.initialize(
            model=network,
            optimizer=optimizer,
            config=deepspeed_config(config, world.size, on_gpu=world.device.type == "cuda"),
            dist_init_required=False,
        )
    return cast(ZeroEngine, engine)


def _start_deepspeed(world: World) -> Any:
    """The package, ready to use the processes of `join_world`."""
    try:
        import deepspeed
        from deepspeed.accelerator import set_accelerator
        from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator
    except ImportError as error:
        raise ConfigError(
            "DeepSpeed cannot be imported; `pip install fastjepa[train]` brings it, and one device needs "
            f"none at speed.zero_stage 0 ({error})"
        ) from error
    if world.device.type == "cpu":  # it would choose a GPU that it sees
        set_accelerator(CPU_Accelerator())
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    # On the CPU DeepSpeed would compile a shared-memory reducer at first use, for over a minute.
    setattr(importlib.import_module("deepspeed.comm.torch"), "build_shm_op", lambda: None)  # noqa: B010
    deepspeed.init_distributed(
        dist_backend="nccl" if world.device.type == "cuda" else "gloo", timeout=HOST_TIMEOUT, verbose=False
    )
    return deepspeed
