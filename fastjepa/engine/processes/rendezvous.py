"""How the processes of a run find each other: addresses, and the store that rank 0 holds for all of them.

torch's own store listens on every interface of its host. Here it gets a socket that listens on MASTER_ADDR
alone, and every wait says what it waits for and ends.
"""

import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable
from concurrent import futures
from concurrent.futures import Future
from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch.distributed as dist

from fastjepa.config import ConfigError
from fastjepa.engine.output import tell
from fastjepa.engine.processes.launchers import Placement

T = TypeVar("T")
_RESOLVE_S = 20.0  # names of a job that just starts may not be known at once
_PATIENT_S = 15.0  # waiting longer than this is worth a line
_TRY_S = 5.0  # one attempt to connect
_POLL_S = 0.1
_SETTLES_S = 2.0  # a connection that is being made


@dataclass(frozen=True)
class Member:
    """A process of the run."""

    rank: int
    host: str
    pid: int

    def __str__(self) -> str:
        return f"rank {self.rank} ({self.host}, process {self.pid})"


@dataclass(frozen=True)
class Meeting:
    """All processes of a run, met.

    Attributes:
        store: shared by all; it must not be used once rank 0 may be gone.
        members: by rank.
        address: of this host, as those that reach MASTER_ADDR see it.
    """

    store: dist.Store
    members: tuple[Member, ...]
    address: str


def meet(placement: Placement, within_s: float) -> Meeting:
    """Find the other processes through rank 0's store, or torchrun's.

    Raises:
        ConfigError: not all of them came in time, or they disagree about how many there are; the message
            says who is missing, or what could not be reached.
    """
    try:
        return _meet(placement, within_s)
    except dist.DistError as error:
        where = f"{placement.master_addr}:{placement.master_port}"
        raise ConfigError(
            f"rank {placement.rank} on {socket.gethostname()}: what answers at {where} does not do so as "
            f"rank 0 does ({str(error).splitlines()[0]}). Is the port another program's, or has rank 0 ended?"
        ) from error


def _meet(placement: Placement, within_s: float) -> Meeting:
    deadline_s = time.monotonic() + within_s
    addresses = _resolve(placement, min(within_s, _RESOLVE_S))
    if placement.rank == 0 and not placement.agent_store:
        address, store = addresses[0], _host_store(placement, addresses[0], within_s)
    else:
        address = _reach(placement, addresses, within_s)
        store = _store(address, placement, within_s)
    own = own_address(address, placement.master_port)
    shared = dist.PrefixStore(f"fastjepa/{placement.attempt}", store)
    return Meeting(shared, _count_members(placement, shared, deadline_s), own)


def _store(address: str, placement: Placement, within_s: float, listener: int | None = None) -> dist.TCPStore:
    made: Future[dist.TCPStore] = Future()

    def make() -> None:
        try:
            store = dist.TCPStore(
                address,
                placement.master_port,
                placement.size,
                is_master=listener is not None,
                timeout=timedelta(seconds=within_s),
                wait_for_workers=False,
                master_listen_fd=listener,
            )
        except RuntimeError as error:
            made.set_exception(error)
        else:
            made.set_result(store)

    try:
        # It keeps to no time where something accepts the connection and says nothing.
        threading.Thread(target=make, daemon=True).start()
        return made.result(within_s)
    except TimeoutError as error:
        raise dist.DistError(f"no answer for {within_s:g} s") from error
    except BaseException:  # a signal
        # Python would end such a thread as soon as it came back from C++, and with it, loudly, the process.
        futures.wait([made], _SETTLES_S)
        raise


def _host_store(placement: Placement, address: str, within_s: float) -> dist.TCPStore:
    where = f"{placement.master_addr}:{placement.master_port}"
    try:
        listener = listen(address, placement.master_port)
    except OSError as error:
        hint = (
            f"{address} is no address of this host, {socket.gethostname()}: MASTER_ADDR must be one of the "
            "host of rank 0"
            if error.errno != 98  # EADDRINUSE
            else "the port is in use, by another run? Choose another MASTER_PORT"
        )
        raise ConfigError(f"rank 0 cannot listen on {where} ({error.strerror}): {hint}") from error
    return _store(address, placement, within_s, listener.detach())


def listen(address: str, port: int = 0) -> socket.socket:
    """A socket that listens on one address, and no other; port 0 takes a free one."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    listener = socket.socket(family)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((address, port))
        listener.listen(4096)
    except OSError:
        listener.close()
        raise
    return listener


def _resolve(placement: Placement, within_s: float) -> list[str]:
    """The addresses of MASTER_ADDR."""

    def look_up() -> list[str] | None:
        try:
            found = socket.getaddrinfo(placement.master_addr, placement.master_port, type=socket.SOCK_STREAM)
        except OSError:
            return None
        return [str(sockaddr[0]) for *_, sockaddr in found]

    addresses = _poll(look_up, time.monotonic() + within_s)
    if not addresses:
        raise ConfigError(
            f"rank {placement.rank} on {socket.gethostname()}: MASTER_ADDR {placement.master_addr} has no "
            f"address, tried for {within_s:g} s. Check its spelling, and that `getent hosts "
            f"{placement.master_addr}` answers here; or give an IP address"
        )
    several_hosts = placement.local_size is not None and placement.local_size < placement.size
    if several_hosts and is_loopback(addresses[0]):
        remedy = (
            "start torchrun on this host with --local-addr and the address by which the others know it"
            if placement.agent_store
            else "set MASTER_ADDR to the address by which the others know the host of rank 0"
        )
        raise ConfigError(
            f"MASTER_ADDR {placement.master_addr} is {addresses[0]} on {socket.gethostname()}, which no "
            f"other host can reach: {remedy}"
        )
    return addresses


def _reach(placement: Placement, addresses: list[str], within_s: float) -> str:
    """The first address that answers."""
    failures: dict[str, str] = {}

    def knock() -> str | None:
        for address in addresses:
            try:
                socket.create_connection((address, placement.master_port), _TRY_S).close()
            except OSError as error:
                failures[address] = error.strerror or "no answer"
            else:
                return address
        return None

    where = f"{placement.master_addr}:{placement.master_port}"
    found = _poll(
        knock, time.monotonic() + within_s, f"rank {placement.rank} waits for rank 0 to listen on {where}"
    )
    if found is None:
        tried = ", ".join(f"{address}: {why}" for address, why in failures.items())
        raise ConfigError(
            f"rank {placement.rank} on {socket.gethostname()} cannot reach rank 0 at {where}, tried for "
            f"{within_s:g} s ({tried}). Check that rank 0 was started, that MASTER_ADDR and MASTER_PORT are "
            "the same everywhere, and that no firewall keeps that port closed; run.join_within_s is how long "
            "to wait"
        )
    return found


def _poll(try_once: Callable[[], T | None], deadline_s: float, waits_for: str | None = None) -> T | None:
    """What it gives, once that is something; None at the deadline, after at least one try."""
    say_at_s = time.monotonic() + _PATIENT_S
    while True:
        result = try_once()
        if result is not None or time.monotonic() >= deadline_s:
            return result
        if waits_for is not None and time.monotonic() >= say_at_s:
            tell(f"{waits_for} …", sys.stderr)
            waits_for = None
        time.sleep(_POLL_S)


def _count_members(placement: Placement, store: dist.Store, deadline_s: float) -> tuple[Member, ...]:
    """Every rank says that it is there; rank 0 says to all who is."""
    me = Member(placement.rank, socket.gethostname(), os.getpid())
    if store.add(f"taken/{me.rank}", 1) > 1:
        raise ConfigError(
            f"two processes say that they are rank {me.rank}; this is {me}. Is RANK set by hand?"
        )
    store.set(f"there/{me.rank}", json.dumps(asdict(me) | {"size": placement.size}))
    if placement.rank == 0:
        outcome = _roll_call(placement, store, deadline_s)
        store.set("roll", json.dumps(outcome))
    else:
        try:
            # Rank 0 stops waiting at its own deadline, and says so.
            store.wait(["roll"], timedelta(seconds=max(deadline_s - time.monotonic(), 1) + _TRY_S))
            outcome = json.loads(store.get("roll"))
        except RuntimeError as error:
            why = str(error).splitlines()[0]
            raise ConfigError(f"{me}: rank 0 did not say who is there ({why})") from error
    if "error" in outcome:
        time.sleep(0.5 if me.rank == 0 else 0)  # the others hear it from this process
        raise ConfigError(str(outcome["error"]))
    members = tuple(Member(**member) for member in outcome["members"])
    if len(members) != placement.size:
        raise ConfigError(f"WORLD_SIZE is {placement.size} for {me}, and {len(members)} for {members[0]}")
    return members


def _roll_call(placement: Placement, store: dist.Store, deadline_s: float) -> dict[str, Any]:
    """The members, or what is wrong, as rank 0 tells all."""
    missing = set(range(placement.size))

    def all_there() -> bool | None:
        missing.difference_update([rank for rank in missing if store.check([f"there/{rank}"])])
        return None if missing else True

    _poll(all_there, deadline_s, f"rank 0 of {placement.size} waits for the other ranks")
    if missing:
        named = ", ".join(map(str, sorted(missing)[:8])) + (" and more" if len(missing) > 8 else "")
        return {
            "error": f"{len(missing)} of {placement.size} ranks did not join in time: {named}. Were they "
            f"started, and do they reach {placement.master_addr}:{placement.master_port}? run.join_within_s "
            "is how long to wait"
        }
    members = [json.loads(store.get(f"there/{rank}")) for rank in range(placement.size)]
    for member in members:
        size = member.pop("size")
        if size != placement.size:
            return {"error": f"WORLD_SIZE is {size} for {Member(**member)}, and {placement.size} for rank 0"}
    return {"members": members}


def is_loopback(address: str) -> bool:
    return address.startswith("127.") or address == "::1"


def own_address(towards: str, port: int) -> str:
    """This host's address on the way to another. Nothing is sent."""
    family = socket.AF_INET6 if ":" in towards else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.connect((towards, port))
        return str(probe.getsockname()[0])


def interfaces() -> dict[str, list[str]]:
    """This host's network interfaces and their addresses; none without psutil, which DeepSpeed brings."""
    try:
        import psutil  # type: ignore[import-untyped]
    except ImportError:
        return {}
    return {
        str(name): [str(entry.address).split("%")[0] for entry in addresses]
        for name, addresses in psutil.net_if_addrs().items()
    }


def interface_of(address: str) -> str | None:
    """The name of the network interface that has this address, or None."""
    return next((name for name, addresses in interfaces().items() if address in addresses), None)
