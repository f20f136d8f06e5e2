"""scripts/train.sbatch itself, with stand-ins for Slurm's commands that start two tasks here."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.conftest import ROOT
from tests.engine.processes.test_signals import assert_gone, ranks_below
from tests.ranks import free_port

if TYPE_CHECKING:
    from tests.conftest import Trainer

SCRIPT = ROOT / "scripts" / "train.sbatch"
JOB = 4242

# With the variables that srun gives its tasks; it ends as the worst of them.
SRUN = """#!/bin/bash
while [[ $1 == --* ]]; do shift; done
for task in 0 1; do
    SLURM_PROCID=$task SLURM_LOCALID=$task SLURM_NTASKS=2 SLURM_STEP_NUM_TASKS=2 \\
        SLURM_STEP_NODELIST=localhost SLURM_JOB_NODELIST='localhost,none[1-2]' "$@" &
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


def start(train: "Trainer", *overrides: str) -> subprocess.Popen[str]:
    commands = train.home / "bin"
    commands.mkdir(exist_ok=True)
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        (commands / name).write_text(text)
        (commands / name).chmod(0o755)
    environment = train.environment | {
        "PATH": f"{commands}{os.pathsep}{train.environment['PATH']}",
        "SLURM_JOB_ID": str(JOB),
        "MASTER_PORT": str(free_port()),  # several such tests may run at the same time
        "REQUEUED": str(train.home / "requeued"),
    }
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
def test_a_job_out_of_time_saves_and_goes_back_into_the_queue_until_it_is_done(train: "Trainer") -> None:
    requeued = train.home / "requeued"
    process = start(train, "optim.steps=120", "speed.workers=1")
    train.wait_for(process, step=5)
    tasks = ranks_below(process.pid)
    assert len(tasks) == 2
    began_s = time.monotonic()
    for task in tasks:  # as --signal=USR1@120 does
        os.kill(task, signal.SIGUSR1)
    assert_gone(tasks)
    assert time.monotonic() - began_s < 30
    stopped = train.finish(process).check()
    step = train.saved_steps[-1]
    assert step < 120
    assert f"Stopped at step {step} of 120; back into the queue" in stopped.out
    assert requeued.read_text() == f"requeue {JOB}\n"

    done = train.finish(start(train, "optim.steps=120", "speed.workers=1")).check()
    assert f"Resuming at step {step} of 120" in done.out
    assert train.rows[-1]["step"] == 120
    assert not (train.run / "stopped").exists()
    assert requeued.read_text() == f"requeue {JOB}\n"


def test_a_failed_job_does_not_go_back(train: "Trainer") -> None:
    failed = train.finish(start(train, "optim.lr=fast")).check(1)
    assert "optim.lr must be a number" in failed.err
    assert not (train.home / "requeued").exists()


def test_the_script_is_sound_shell() -> None:
    subprocess.run(["bash", "-n", str(SCRIPT)], check=True)
    checker = shutil.which("shellcheck") or shutil.which("shellcheck", path=str(Path(sys.executable).parent))
    if checker is not None:
        subprocess.run([checker, str(SCRIPT)], check=True)
