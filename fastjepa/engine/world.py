"""The processes of a run: which of them this is, on which device, and what they decide together."""

import os
import socket
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar, cast

import torch
import torch.distributed as dist

from fastjepa.config import ConfigError
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
