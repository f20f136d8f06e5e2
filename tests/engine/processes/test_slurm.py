"""scripts/train.sbatch itself, with stand-ins for Slurm's commands that start two tasks here."""

import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.conftest import ROOT
from tests.faults.evidence import Watched, Witness
from tests.faults.processes import assert_gone, ranks_below
from tests.ranks import free_port

if TYPE_CHECKING:
    from tests.conftest import Trainer

SCRIPT = ROOT / "scripts" / "train.sbatch"
JOB = 4242

# With the variables that srun gives its tasks; it ends as the worst of them. The tasks are watched.
SRUN = """#!/bin/bash
while [[ $1 == --* ]]; do
    echo "$1" >>"$OPTIONS"
    shift
done
for task in 0 1; do
    SLURM_PROCID=$task SLURM_LOCALID=$task SLURM_NTASKS=2 SLURM_STEP_NUM_TASKS=2 \\
        SLURM_STEP_NODELIST=localhost SLURM_JOB_NODELIST='localhost,none[1-2]' \\
        "$1" "$2" $WITNESS "${@:3}" &
    tasks+=($!)
done
status=0
for task in "${tasks[@]}"; do wait "$task" || status=$?; done
exit $status
"""
SCONTROL = """#!/bin/bash
echo "$@" >>"$REQUEUED"
"""

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="finds processes in /proc")


@pytest.fixture
def watched(train: "Trainer") -> Watched:
    return Watched(train, Witness(train.home / "witness"))


def start(watched: Watched, *overrides: str, gates: Sequence[int] = ()) -> subprocess.Popen[str]:
    train = watched.trainer
    watched.close(gates)
    commands = train.home / "bin"
    commands.mkdir(exist_ok=True)
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        (commands / name).write_text(text)
        (commands / name).chmod(0o755)
    environment = (
        train.environment
        | {
            "PATH": f"{commands}{os.pathsep}{train.environment['PATH']}",
            "SLURM_JOB_ID": str(JOB),
            "MASTER_PORT": str(free_port()),  # several such tests may run at the same time
            "SLURM_CPUS_PER_TASK": "3",
            "OPTIONS": str(train.home / "options"),
            "REQUEUED": str(train.home / "requeued"),
            "WITNESS": " ".join(watched.witness.launcher()[1:]),
        }
    )
    process = subprocess.Popen(
        ["bash", str(SCRIPT), str(train.write_config()), str(train.run), *overrides],
        cwd=ROOT,
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    train.started.append(process)
    return process


@pytest.mark.slow_fault
def test_a_job_out_of_time_saves_and_goes_back_into_the_queue_until_it_is_done(watched: Watched) -> None:
    train = watched.trainer
    requeued = train.home / "requeued"
    process = start(watched, "optim.steps=12", "speed.workers=1", gates=[7])
    with watched.standing_at(process, 7):
        tasks = ranks_below(process.pid)
        assert len(tasks) == 2
        for task in tasks:  # as --signal=USR1@120 does
            os.kill(task, signal.SIGUSR1)
    assert_gone(tasks)
    stopped = train.finish(process).check()
    step = train.saved_steps[-1]
    assert step == 8
    assert f"Stopped at step {step} of 12; back into the queue" in stopped.out
    assert requeued.read_text() == f"requeue {JOB}\n"

    done = train.finish(start(watched, "optim.steps=12", "speed.workers=1")).check()
    assert f"Resuming at step {step} of 12" in done.out
    assert train.rows[-1]["step"] == 12
    assert not (train.run / "stopped").exists()
    assert requeued.read_text() == f"requeue {JOB}\n"
    options = (train.home / "options").read_text().split()
    assert options == 2 * ["--kill-on-bad-exit=1", "--cpus-per-task=3"]


def test_a_failed_job_does_not_go_back(watched: Watched) -> None:
    train = watched.trainer
    failed = train.finish(start(watched, "optim.lr=fast")).check(1)
    assert "optim.lr must be a number" in failed.err
    assert not (train.home / "requeued").exists()


def test_the_script_is_sound_shell() -> None:
    subprocess.run(["bash", "-n", str(SCRIPT)], check=True)
    subprocess.run([Path(sys.executable).with_name("shellcheck"), str(SCRIPT)], check=True)
