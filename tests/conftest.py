"""What tests share: a run that trains in seconds, and the real command as a process."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import torch
import yaml

# Where there is no GPU, Triton's kernels are run by its interpreter. It has to be asked for before they
# are defined: before any test imports fastjepa_kernels.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# A busy machine is no failure.
hypothesis.settings.register_profile("fastjepa", deadline=None)
hypothesis.settings.load_profile("fastjepa")

ROOT = Path(__file__).resolve().parents[1]
TRAIN = ROOT / "fastjepa" / "train.py"
BIN = Path(sys.executable).parent

# 280 images, so an epoch is 17 steps, of 16 crops each on a grid of 7 x 7 patches.
TINY: dict[str, dict[str, Any]] = {
    "model": {
        "size": "free",
        "width": 32,
        "depth": 1,
        "heads": 2,
        "patch_size": 4,
        "predictor_width": 16,
        "predictor_depth": 1,
        "predictor_heads": 2,
    },
    "masks": {"mode": "budget", "context_tokens": 10, "min_keep": 4},
    "data": {
        "name": "fashion_mnist",
        "image_size": 28,
        "channels": 1,
        "mean": [0.286],
        "std": [0.353],
        "hold_out": 9720,
    },
    "optim": {
        "global_batch": 16,
        "epochs": None,
        "steps": 10,
        "warmup_epochs": 0.25,
        "lr": 1e-3,
        "start_lr": 1e-4,
        "momentum": 0.99,
        "precision": "fp32",
    },
    "probe": {"at_ends": False, "bank": 100, "queries": 50, "final_bank": 100, "final_queries": 50},
    "speed": {"workers": 0, "device": "cpu"},
    "run": {"report": False, "log_every": 5, "save_every": 5},
}


@dataclass(frozen=True)
class Trainer:
    """The command `python fastjepa/train.py` on the tiny configuration, its run folder below `home`."""

    home: Path
    started: list[subprocess.Popen[str]] = field(default_factory=list)

    @property
    def run(self) -> Path:
        return self.home / "run"

    @property
    def environment(self) -> dict[str, str]:
        """This process's, with one thread for each of those started, and without what a launcher has set."""
        launchers = ("RANK", "WORLD_SIZE", "LOCAL_", "MASTER_", "SLURM_", "OMPI_", "TORCHELASTIC_", "GLOO_")
        launched = (*launchers, "DS_ACCELERATOR", "FASTJEPA_", "TRITON_")
        kept = {key: value for key, value in os.environ.items() if not key.startswith(launched)}
        # Launchers look for `python` and each other on PATH.
        return kept | {"OMP_NUM_THREADS": "1", "PATH": f"{BIN}{os.pathsep}{os.environ.get('PATH', '')}"}

    @property
    def rows(self) -> list[dict[str, Any]]:
        """metrics.jsonl, without a last line that is only half there yet."""
        path = self.run / "metrics.jsonl"
        text = path.read_text() if path.exists() else ""
        return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]

    @property
    def saved_steps(self) -> list[int]:
        return sorted(int(path.name[5:]) for path in (self.run / "checkpoints").glob("step_????????"))

    def write_config(self) -> Path:
        path = self.home / "tiny.yaml"
        path.write_text(yaml.safe_dump(TINY | {"run": TINY["run"] | {"dir": str(self.run)}}))
        return path

    def start(
        self, *overrides: str, launcher: Sequence[str] = (sys.executable,), **popen: Any
    ) -> subprocess.Popen[str]:
        """Start it, with pipes; it does not outlive the test."""
        process = subprocess.Popen(
            [*launcher, str(TRAIN), "--config", str(self.write_config()), *overrides],
            env=self.environment,
            text=True,
            **{"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **popen},
        )
        self.started.append(process)
        return process

    def __call__(
        self, *overrides: str, launcher: Sequence[str] = (sys.executable,), timeout_s: float = 150
    ) -> "Finished":
        """Run it to its end."""
        return self.finish(self.start(*overrides, launcher=launcher), timeout_s)

    def finish(self, process: subprocess.Popen[str], timeout_s: float = 150) -> "Finished":
        out, err = process.communicate(timeout=timeout_s)
        return Finished(process.returncode, out, err)

    def wait_for(self, process: subprocess.Popen[str], step: int, timeout_s: float = 120) -> None:
        """Until metrics.jsonl has a row of `step` or a later one."""
        deadline_s = time.monotonic() + timeout_s
        while not any(row["step"] >= step for row in self.rows):
            assert process.poll() is None, f"it ended before step {step}: {process.communicate()}"
            assert time.monotonic() < deadline_s, f"no step {step} after {timeout_s} s"
            time.sleep(0.005)


@dataclass(frozen=True)
class Finished:
    """How a process ended."""

    code: int
    out: str
    err: str

    def check(self, code: int = 0) -> "Finished":
        assert self.code == code, f"exit {self.code}, not {code}\n{self.out}\n{self.err}"
        assert "Traceback" not in self.err, self.err
        return self

    @property
    def errors(self) -> list[str]:
        return [line for line in self.err.splitlines() if line.startswith("error:")]


def kill(process: subprocess.Popen[str]) -> None:
    if process.poll() is None:
        process.kill()
        process.wait()
    for pipe in (process.stdout, process.stderr):
        if pipe is not None:  # not read to its end, which those that outlive the process would hold open
            pipe.close()


@pytest.fixture(scope="session")
def trainer_at() -> Iterator[Callable[[Path], Trainer]]:
    """Trainers in folders of one's choice; what they started ends with the tests."""
    trainers: list[Trainer] = []

    def make(home: Path) -> Trainer:
        trainers.append(Trainer(home))
        return trainers[-1]

    yield make
    for trainer in trainers:
        for process in trainer.started:
            kill(process)


@pytest.fixture
def train(tmp_path: Path, trainer_at: Callable[[Path], Trainer]) -> Iterator[Trainer]:
    """A trainer in a folder of its own."""
    trainer = trainer_at(tmp_path)
    yield trainer
    for process in trainer.started:
        kill(process)
