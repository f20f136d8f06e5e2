"""The processes of a run: which of them this is, on which device, and what they decide together."""

import os
import re
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from datetime import timedelta
from typing import TypeVar, cast

import torch
import torch.distributed as dist

from fastjepa.config import ConfigError, RunConfig
from fastjepa.engine.processes.activity import Activity, Doing
from fastjepa.engine.processes.exchange import gather_plain
from fastjepa.engine.processes.files import allow_files
from fastjepa.engine.processes.launchers import Placement, find_placement
from fastjepa.engine.processes.rendezvous import Meeting, interface_of, interfaces, meet
from fastjepa.engine.processes.stopping import PeerFailed
from fastjepa.engine.processes.watch import Guest, Host, Watch

T = TypeVar("T")
# Rank 0 judges and saves while the others wait. A rank that is lost is noticed by the watch, far earlier.
HOST_TIMEOUT = timedelta(hours=12)


@dataclass(frozen=True)
class World:
    """This process among all."""

    rank: int
    size: int
    device: torch.device
    hosts: dist.ProcessGroup | None  # gloo, for what must not wait for a device; None in one process
    activity: Activity = field(default_factory=Activity)
    watch: Watch | None = None  # over the other processes

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def worst(self, code: int) -> int:
        """The largest code that any rank gives."""
        if self.size == 1:
            return code
        tensor = torch.tensor([code])
        with self.activity.during(Doing.AGREEING):
            dist.all_reduce(tensor, op=dist.ReduceOp.MAX, group=self.hosts)
        return int(tensor.item())

    def on_main(self, do: Callable[[], T]) -> T | None:
        """Run `do` on rank 0 while the others wait; if it fails there, every rank raises.

        Returns:
            Its result on rank 0, None elsewhere.
        """
        result, failure = None, None
        with self.activity.during(Doing.ON_MAIN):
            if self.is_main:
                try:
                    result = do()
                except Exception as error:  # raised again below, once the others know
                    failure = error
        if self.worst(int(failure is not None)):
            raise failure or PeerFailed("rank 0 could not go on; its message says why")
        return result

    def gather(self, value: T) -> list[T]:
        """Every rank's value, by rank, on every rank: strings, bools, numbers, None, and lists of them."""
        if self.size == 1:
            return [value]
        with self.activity.during(Doing.AGREEING):
            return gather_plain(value, self.hosts)

    def mean(self, values: torch.Tensor) -> torch.Tensor:
        """The mean over ranks of a tensor on the device."""
        if self.size > 1:
            dist.all_reduce(values)
        return values / self.size


def join_world(
    device: str, run: RunConfig | None = None, met: Callable[[bool], None] = lambda launched: None
) -> World:
    """Join the processes that a launcher started, or be the only one, which listens on no port.

    Args:
        device: auto, cpu or cuda.
        run: how long to wait for whom.
        met: called once all processes know of each other, with whether there are others: one that is told to
            stop from then on does so with them.

    Raises:
        ConfigError: CUDA was asked for and there is none, the launcher's variables make no sense, or the
            other processes cannot be found.
    """
    run = run or RunConfig()
    placement = find_placement(os.environ)
    where = _device(device, placement)
    os.environ |= placement.variables()  # for DeepSpeed
    if placement.size == 1:
        met(False)
        return World(0, 1, where, None)
    allow_files(placement.size)
    meeting = meet(placement, run.join_within_s)
    met(True)
    activity = Activity()
    limits = (activity, run.dead_after_s, run.hang_after_s)
    is_main = placement.rank == 0
    watch = Host(meeting, *limits) if is_main else Guest(placement.rank, meeting, *limits)
    watch.start()
    try:
        with _farewell(watch):
            hosts = _connect(placement, meeting, where)
    except BaseException:
        leave_world()
        raise
    return World(placement.rank, placement.size, where, hosts, activity, watch)


def _connect(placement: Placement, meeting: Meeting, device: torch.device) -> dist.ProcessGroup:
    """Start the group of all ranks, and give that of their hosts.

    Raises:
        ConfigError: a variable names no interface of this host, or the ranks do not reach each other.
    """
    _keep_gloo_on(meeting.address)
    backend = "nccl" if device.type == "cuda" else "gloo"
    try:
        dist.init_process_group(
            backend,
            store=dist.PrefixStore("group", meeting.store),
            rank=placement.rank,
            world_size=placement.size,
            timeout=HOST_TIMEOUT,
        )
        return cast(dist.ProcessGroup, dist.new_group(backend="gloo", timeout=HOST_TIMEOUT))
    except RuntimeError as error:
        raise _Unconnected(
            f"{meeting.members[placement.rank]} cannot connect to the other ranks ({_in_short(error)}). Gloo "
            f"takes the interface that GLOO_SOCKET_IFNAME names, {os.environ.get('GLOO_SOCKET_IFNAME')}, and "
            "NCCL what NCCL_SOCKET_IFNAME does: every host must reach the others by it, on all ports"
        ) from error


class _Unconnected(ConfigError):
    """Perhaps for the end of another rank."""


@contextmanager
def _farewell(watch: Watch) -> Iterator[None]:
    """If what is within fails, the others hear why; if it is for another rank's end, this one says that."""
    try:
        yield
    except BaseException as error:
        if isinstance(error, _Unconnected) or (isinstance(error, RuntimeError) and is_of_connection(error)):
            watch.explain()
        watch.leave(_in_short(error))
        raise


def _device(device: str, placement: Placement) -> torch.device:
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("speed.device is cuda, but torch sees no CUDA device here; use auto or cpu")
    if device == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    count, index = torch.cuda.device_count(), placement.local_rank
    if count == 1 and placement.launcher in ("srun", "mpirun"):
        index = 0  # they can show each process a device of its own alone
    if index >= count:
        raise ConfigError(
            f"rank {placement.rank} is process {index} on its host, which shows it {count} CUDA devices: "
            "start one process for each device"
        )
    where = torch.device("cuda", index)
    torch.cuda.set_device(where)
    return where


def _keep_gloo_on(address: str) -> None:
    """Gloo would take the interface of the host's name, which need not be that of MASTER_ADDR.

    Raises:
        ConfigError: GLOO_SOCKET_IFNAME is set, and no interface of this host.
    """
    interface = interface_of(address)
    if interface is not None:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
    stated, present = os.environ.get("GLOO_SOCKET_IFNAME", ""), interfaces()
    missing = [name for name in stated.split(",") if name and name not in present]
    if present and missing:
        raise ConfigError(
            f"GLOO_SOCKET_IFNAME names {missing[0]}, which is no network interface of "
            f"{socket.gethostname()}: it has {', '.join(present)}. Leave it unset to take the one that leads "
            "to MASTER_ADDR"
        )


def start_group_of_one(world: World) -> None:
    """The process group that DeepSpeed wants in a run of one process too; gloo's listens on loopback."""
    if not dist.is_initialized():
        _keep_gloo_on("127.0.0.1")
        backend = "nccl" if world.device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)


@contextmanager
def joined(device: str, run: RunConfig, met: Callable[[bool], None]) -> Iterator[World]:
    """Within it this process is one of the run's; at its end it says goodbye to the others.

    Args and errors are as of `join_world`.
    """
    world = join_world(device, run, met)
    try:
        with nullcontext() if world.watch is None else _farewell(world.watch):
            yield world
        if world.watch is not None:
            world.watch.leave()
    finally:
        leave_world()


def is_of_connection(error: RuntimeError) -> bool:
    """Whether a collective failed because another rank is gone."""
    return isinstance(error, dist.DistError) or bool(
        re.search(r"gloo|NCCL|[Cc]onnection (closed|reset)|[Bb]roken pipe", str(error))
    )


def _in_short(error: BaseException) -> str:
    return f"{str(error).splitlines()[0]}" if str(error) else type(error).__name__


def leave_world() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()
