"""Which of a run's processes this is, as the variables of a launcher say it. Nothing is started here."""

import re
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import product
from typing import NoReturn

from fastjepa.config import ConfigError

TORCH_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")

# Of jobs; below the range from which systems choose ports by themselves, above the well-known ones.
_JOB_PORTS = range(15_000, 30_000)


@dataclass(frozen=True)
class Placement:
    """Where this process stands among all.

    Attributes:
        launcher: what said so, for messages.
        rank, size: of this process, of all.
        local_rank: its number on this host, and so its device.
        local_size: processes on this host, where the launcher says it.
        master_addr, master_port: where rank 0 can be reached; empty and 0 for one process.
        agent_store: the launcher holds the store at that address already, as torchrun does.
        attempt: how often the launcher has started all of them again.
    """

    launcher: str
    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int | None = None
    master_addr: str = ""
    master_port: int = 0
    agent_store: bool = False
    attempt: int = 0

    def variables(self) -> dict[str, str]:
        """The variables by which torch and DeepSpeed know all this."""
        known = {"RANK": str(self.rank), "WORLD_SIZE": str(self.size), "LOCAL_RANK": str(self.local_rank)}
        if self.master_addr:
            known |= {"MASTER_ADDR": self.master_addr, "MASTER_PORT": str(self.master_port)}
        return known


def find_placement(environment: Mapping[str, str]) -> Placement:
    """Read what torchrun, deepspeed, mpirun or srun has set; nothing set is one process alone.

    RANK comes first, since torchrun and deepspeed are themselves started by srun or mpirun; then MPI, which
    srun's variables surround.

    Raises:
        ConfigError: variables are missing, are no numbers, or contradict each other.
    """
    if "RANK" in environment:
        placement = _of_torch(environment)
    elif "OMPI_COMM_WORLD_RANK" in environment:
        placement = _of_mpi(environment)
    elif "SLURM_PROCID" in environment and _slurm_tasks(environment) is not None:
        placement = _of_slurm(environment)
    else:
        for name in ("WORLD_SIZE", "LOCAL_RANK"):
            if environment.get(name, "0") not in ("0", "1"):
                _refuse(f"{name} is {environment[name]}, but RANK is not set", "python")
        placement = Placement("python")
    _check(placement)
    return placement


def _of_torch(environment: Mapping[str, str]) -> Placement:
    launcher = "torchrun" if "TORCHELASTIC_RUN_ID" in environment else "the launcher"
    size = _number(environment, "WORLD_SIZE", launcher)
    if size == 1:
        rank, local_rank = _number(environment, "RANK", launcher), int(environment.get("LOCAL_RANK", "0"))
        return Placement(launcher, rank, size, local_rank)
    missing = [name for name in TORCH_VARIABLES if not environment.get(name)]
    if missing:
        _refuse(f"RANK is set, but {' and '.join(missing)} not", launcher)
    local_size = environment.get("LOCAL_WORLD_SIZE") or environment.get("LOCAL_SIZE")
    return Placement(
        launcher,
        rank=_number(environment, "RANK", launcher),
        size=size,
        local_rank=_number(environment, "LOCAL_RANK", launcher),
        local_size=int(local_size) if local_size else None,
        master_addr=environment["MASTER_ADDR"],
        master_port=_number(environment, "MASTER_PORT", launcher),
        agent_store=environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True",
        attempt=int(environment.get("TORCHELASTIC_RESTART_COUNT", "0")),
    )


def _of_mpi(environment: Mapping[str, str]) -> Placement:
    size = _number(environment, "OMPI_COMM_WORLD_SIZE", "mpirun")
    local_size = int(environment.get("OMPI_COMM_WORLD_LOCAL_SIZE", "0")) or None
    master_addr = environment.get("MASTER_ADDR", "127.0.0.1" if local_size == size else "")
    port = environment.get("MASTER_PORT") or (_mpi_port(environment) if local_size == size else None)
    if size > 1 and not (master_addr and port):
        _refuse(
            "mpirun does not say where rank 0 can be reached: give it -x MASTER_ADDR=<host of rank 0> "
            "-x MASTER_PORT=<a free port there>",
            "mpirun",
        )
    return Placement(
        "mpirun",
        rank=_number(environment, "OMPI_COMM_WORLD_RANK", "mpirun"),
        size=size,
        local_rank=_number(environment, "OMPI_COMM_WORLD_LOCAL_RANK", "mpirun"),
        local_size=local_size,
        master_addr=master_addr,
        master_port=_number({"MASTER_PORT": port}, "MASTER_PORT", "mpirun") if port else 0,
    )


def _mpi_port(environment: Mapping[str, str]) -> str | None:
    """For processes of one host: from the name of the job, which Open MPI 4 and 5 tell all of them."""
    job = environment.get("PMIX_NAMESPACE")
    return str(_JOB_PORTS[zlib.crc32(job.encode()) % len(_JOB_PORTS)]) if job else None


def _of_slurm(environment: Mapping[str, str]) -> Placement:
    size = _slurm_tasks(environment)
    assert size is not None
    rank = _number(environment, "SLURM_PROCID", "srun")
    if size == 1:
        return Placement("srun", rank)
    stated = environment.get("WORLD_SIZE")
    if stated is not None and stated != str(size):
        _refuse(f"WORLD_SIZE is {stated}, but srun started {size} tasks", "srun")
    # A step of a job may be on fewer hosts than the job.
    hosts = environment.get("SLURM_STEP_NODELIST") or environment.get("SLURM_JOB_NODELIST", "")
    named = expand_hosts(hosts)
    if not named and not environment.get("MASTER_ADDR"):
        _refuse("neither SLURM_JOB_NODELIST nor MASTER_ADDR is set", "srun")
    port = environment.get("MASTER_PORT")
    if not port:
        job = _number(environment, "SLURM_JOB_ID", "srun")
        port = str(_JOB_PORTS[job % len(_JOB_PORTS)])
    return Placement(
        "srun",
        rank=rank,
        size=size,
        local_rank=_number(environment, "SLURM_LOCALID", "srun"),
        local_size=size if len(named) == 1 else None,
        master_addr=environment.get("MASTER_ADDR") or named[0],
        master_port=_number({"MASTER_PORT": port}, "MASTER_PORT", "srun"),
    )


def _slurm_tasks(environment: Mapping[str, str]) -> int | None:
    """Of this step; of the whole job where that is not said."""
    for name in ("SLURM_STEP_NUM_TASKS", "SLURM_NTASKS"):
        if environment.get(name):
            return _number(environment, name, "srun")
    return None


def _number(environment: Mapping[str, str], name: str, launcher: str) -> int:
    value = environment.get(name, "")
    if not re.fullmatch(r"\d+", value, re.ASCII):
        _refuse(f"{name} must be a whole number, got {value!r}" if value else f"{name} is not set", launcher)
    return int(value)


def _check(placement: Placement) -> None:
    rank, size, local_rank = placement.rank, placement.size, placement.local_rank
    if size < 1 or rank >= size:
        _refuse(f"there is no rank {rank} of {size} processes; ranks are 0 to {size - 1}", placement.launcher)
    if local_rank >= (placement.local_size or size):
        _refuse(
            f"the local rank {local_rank} is not one of {placement.local_size or size} processes",
            placement.launcher,
        )
    if size > 1 and not 0 < placement.master_port < 2**16:
        _refuse(f"MASTER_PORT must be from 1 to 65535, got {placement.master_port}", placement.launcher)


def _refuse(what: str, launcher: str) -> NoReturn:
    raise ConfigError(
        f"the environment of {launcher} is not that of a run: {what}. Start the processes with torchrun, "
        "deepspeed, or srun with one task for each GPU; or unset "
        f"{', '.join(TORCH_VARIABLES)} to train in one process"
    )


def expand_hosts(hosts: str) -> list[str]:
    """The host names of a Slurm node list, in its order: `gpu[08-10,12],login` has five.

    Any name may have several brackets, and text after them; leading zeros are kept.

    Raises:
        ConfigError: it is no such list.
    """
    return [name for item in _outside_brackets(hosts) for name in _expand(item)]


def _outside_brackets(hosts: str) -> list[str]:
    """Split at commas that are not between brackets."""
    found = re.findall(r"(?:[^,\[\]]|\[[^\[\]]*\])+", hosts)
    if ",".join(found) != hosts:
        raise ConfigError(f"{hosts!r} is no list of hosts as Slurm writes them")
    return found


def _expand(item: str) -> list[str]:
    parts = re.split(r"\[([^\]]*)\]", item)  # text, numbers, text, numbers, …, text
    choices = [_numbers(part, item) if i % 2 else [part] for i, part in enumerate(parts)]
    return ["".join(chosen) for chosen in product(*choices)]


def _numbers(ranges: str, item: str) -> list[str]:
    """`08-10,12` as texts."""
    found: list[str] = []
    for part in ranges.split(","):
        match = re.fullmatch(r"(\d+)(?:-(\d+))?", part, re.ASCII)
        if match is None:
            raise ConfigError(f"{item!r} is no host, or hosts, as Slurm writes them")
        first, last = match[1], match[2] or match[1]
        found += [str(number).zfill(len(first)) for number in range(int(first), int(last) + 1)]
    return found
