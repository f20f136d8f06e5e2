"""Engines of DeepSpeed, which is imported where one is started, and nowhere else."""

import importlib
import inspect
import io
import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, redirect_stdout
from typing import Any, cast

import torch
from torch import nn

from fastjepa.config import ConfigError, OptimConfig
from fastjepa.engine.processes.world import HOST_TIMEOUT, World, start_group_of_one
from fastjepa.engine.protocol import ZeroEngine
from fastjepa.models.block import Block


class UncompiledAdamW(torch.optim.AdamW):
    """torch's AdamW without the wrappers of its methods, each of which loads torch's compiler when called.

    They keep the compiler out of an optimizer; that costs two seconds at the start of every process, and here
    nothing compiles one.
    """

    add_param_group = inspect.unwrap(torch.optim.AdamW.add_param_group)
    zero_grad = inspect.unwrap(torch.optim.AdamW.zero_grad)
    step = torch.no_grad()(inspect.unwrap(torch.optim.AdamW.step))


def start_zero(
    network: nn.Module,
    groups: list[dict[str, Any]],
    optim: OptimConfig,
    settings: dict[str, Any],
    world: World,
    compiles: bool,
) -> ZeroEngine:
    """What steps `network` with AdamW and ZeRO.

    Args:
        network: on its device.
        groups: of its parameters.
        optim: of the run.
        settings: DeepSpeed's configuration.
        world: that was joined.
        compiles: whether torch.compile will be used in this process.

    Raises:
        ConfigError: DeepSpeed cannot be imported.
    """
    with nullcontext() if compiles else _without_compiler():
        deepspeed = _import_deepspeed(world)
        # At ZeRO 3 the weights of a block come and go together, by one hook: one in each of its layers would
        # take half of a small step, and keep the block from its fused passes.
        deepspeed.utils.set_z3_leaf_modules(network, [Block])
        # Those that are tried are told by their very type; of others there is a warning.
        importlib.import_module("deepspeed.runtime.zero.utils").ZERO_SUPPORTED_OPTIMIZERS.append(
            UncompiledAdamW
        )
        optimizer = UncompiledAdamW(groups, lr=optim.lr, betas=optim.betas, eps=optim.eps, fused=True)
        with redirect_stdout(io.StringIO()):  # its bf16 optimizer prints memory figures past any log level
            engine, *_ = deepspeed.initialize(
                model=network, optimizer=optimizer, config=settings, dist_init_required=False
            )
    return cast(ZeroEngine, engine)


def _import_deepspeed(world: World) -> Any:
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
    # It calls collectives by names that torch 2.14 warns of at each call.
    warnings.filterwarnings("ignore", ".* is deprecated. Please use `torch.distributed", FutureWarning)
    # On the CPU DeepSpeed would compile a shared-memory reducer at first use, for over a minute.
    setattr(importlib.import_module("deepspeed.comm.torch"), "build_shm_op", lambda: None)  # noqa: B010
    start_group_of_one(world)
    deepspeed.init_distributed(
        dist_backend="nccl" if world.device.type == "cuda" else "gloo", timeout=HOST_TIMEOUT, verbose=False
    )
    return deepspeed


_DECORATORS = ((torch, "compile"), (torch.compiler, "disable"), (torch, "_disable_dynamo"))


@contextmanager
def _without_compiler() -> Iterator[None]:
    """Within it, torch's decorators about compilation leave functions as they are.

    DeepSpeed decorates what it has for Muon, and at ZeRO 3 each hook of each layer. That alone loads the
    compiler, two seconds of each process, and at ZeRO 3 slows down every call.
    """

    def leave(function: Callable[..., Any] | None = None, *_: Any, **__: Any) -> Any:
        return leave if function is None else function

    found = [(module, name, getattr(module, name)) for module, name in _DECORATORS if hasattr(module, name)]
    try:
        for module, name, _ in found:
            setattr(module, name, leave)
        yield
    finally:
        for module, name, decorator in found:
            setattr(module, name, decorator)
