"""What is held against an uninterrupted run: the images trained on, and the bytes of checkpoints."""

import json
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from safetensors.torch import load_file
from torch import Tensor

from fastjepa.engine.checkpoints.checkpoint import checkpoint_path

if TYPE_CHECKING:
    from tests.conftest import Finished, Trainer

STEPS = 120  # seven epochs
# What most tests run, so that they share what they are held against. Log lines do not fall on checkpoints:
# what a line averages must survive too.
RUN = (f"optim.steps={STEPS}", "run.log_every=4", "run.save_every=5", "probe.every_steps=65", "data.flip=0.5")

TIMEOUT_S = 500  # on a machine that is busy with other things
WITNESS, RANKS = Path(__file__).with_name("witness.py"), Path(__file__).parents[1] / "ranks.py"
SPEEDS = {"images_per_second", "data_wait_fraction", "elapsed_s", "judge_s", "save_s"}


class Seen(NamedTuple):
    """An image as a step was given it; the last two are checksums."""

    epoch: int
    image: int
    pixels: int
    masks: int


@dataclass
class Witness:
    """Follows one run through all the processes it takes.

    Attributes:
        folder: holds a folder for each start of the run, in it a file for each rank, and gates beside them.
    """

    folder: Path
    starts: int = field(default=0, init=False)

    def launcher(self, *launcher: str) -> tuple[str, ...]:
        """What to start the run's command with, another each time: a launcher of ranks, or python alone."""
        self.starts += 1
        return (*(launcher or (sys.executable,)), str(WITNESS), str(self._start(self.starts)))

    def newest_step(self) -> int:
        """The last step that a rank has begun since the last start, from 0; -1 before the first."""
        return max((max(steps) for steps in self._read(self.starts) if steps), default=-1)

    def trained_on(self) -> dict[int, list[Seen]]:
        """Step -> images, of all ranks, without the steps that a resumed run took once more."""
        kept: dict[int, list[Seen]] = {}
        for start in range(1, self.starts + 1):
            ranks = self._read(start)
            first = min((min(steps) for steps in ranks if steps), default=None)
            if first is None:  # it was gone before its first step
                continue
            # What was done past the checkpoint that it resumed from is in no weights any more.
            kept = {step: images for step, images in kept.items() if step < first}
            for steps in ranks:
                for step, images in steps.items():
                    kept.setdefault(step, []).extend(images)
        return kept

    def gate(self, step: int) -> Path:
        """While this file is there, every rank stands before that step, once it has noted it."""
        return self.folder / f"gate_{step}"

    def _start(self, number: int) -> Path:
        return self.folder / f"start_{number:03d}"

    def _read(self, start: int) -> list[dict[int, list[Seen]]]:
        """For each rank of a start, step -> images."""
        ranks = []
        for file in self._start(start).glob("*.jsonl"):
            # Without a last line that is only half there yet.
            lines = [line for line in file.read_text().splitlines(keepends=True) if line.endswith("\n")]
            notes = map(json.loads, lines)
            ranks.append(
                {note["step"]: [Seen(*image) for batch in note["seen"] for image in batch] for note in notes}
            )
        return ranks


@dataclass(frozen=True)
class Watched:
    """A run with its witness."""

    trainer: "Trainer"
    witness: Witness

    @property
    def step(self) -> int:
        """Of its newest checkpoint."""
        return self.trainer.saved_steps[-1]

    @property
    def checkpoints(self) -> Path:
        return self.trainer.run / "checkpoints"

    def start(
        self, *overrides: str, launcher: Sequence[str] = (), gates: Sequence[int] = (), **popen: Any
    ) -> subprocess.Popen[str]:
        """Start it; it will stand before each of the steps in `gates` until `standing_at` lets it through."""
        self.close(gates)
        return self.trainer.start(*overrides, launcher=self.witness.launcher(*launcher), **popen)

    def close(self, gates: Sequence[int]) -> None:
        self.witness.folder.mkdir(exist_ok=True)
        for step in gates:
            self.witness.gate(step).touch()

    def __call__(self, *overrides: str, launcher: Sequence[str] = ()) -> "Finished":
        """Run it to its end."""
        return self.finish(self.start(*overrides, launcher=launcher))

    def finish(self, process: subprocess.Popen[str]) -> "Finished":
        return self.trainer.finish(process, TIMEOUT_S)

    def wait_for(self, process: subprocess.Popen[str], there: Callable[[], bool]) -> bool:
        """Until something is there; False if the process has ended before."""
        deadline_s = time.monotonic() + TIMEOUT_S
        while not there():
            if process.poll() is not None:
                return False
            assert time.monotonic() < deadline_s, f"it was not there after {TIMEOUT_S} s"
            time.sleep(0.002)
        return True

    @contextmanager
    def standing_at(self, process: subprocess.Popen[str], step: int) -> Iterator[None]:
        """Wait until a rank stands before that step, from 0, one of the gates; let all go on afterwards.

        However slow the machine is that tests, the run is then where the test wants it.
        """
        gate = self.witness.gate(step)
        assert gate.exists(), "start() was not told of it"
        there = self.wait_for(process, lambda: self.witness.newest_step() >= step)
        assert there, f"it ended before step {step}: {process.communicate()}"
        yield
        gate.unlink()


def images_lost(witness: Witness, reference: Witness) -> int:
    """How often an image of an epoch was left out, or trained on once too often, against the reference."""
    ours, expected = (
        Counter((seen.epoch, seen.image) for images in run.trained_on().values() for seen in images)
        for run in (witness, reference)
    )
    assert expected, "the reference saw nothing"
    return (expected - ours).total() + (ours - expected).total()


def assert_same_steps(witness: Witness, reference: Witness) -> None:
    """Every step had the same images, cut and masked alike, whichever rank took them."""
    ours, expected = witness.trained_on(), reference.trained_on()
    assert ours.keys() == expected.keys()
    assert [step for step in ours if sorted(ours[step]) != sorted(expected[step])] == []


def tensors(run: Path, step: int) -> dict[str, Tensor]:
    """Every tensor of a checkpoint, by file and name: weights, target encoder and both moments."""
    folder = checkpoint_path(run / "checkpoints", step)
    found = {
        f"{file.stem}/{name}": tensor
        for file in folder.glob("*.safetensors")
        for name, tensor in load_file(file).items()
    }
    assert {name.partition("/")[0] for name in found} == {"student", "target", "exp_avg", "exp_avg_sq"}
    return found


def differing_bytes(ours: dict[str, Tensor], expected: dict[str, Tensor]) -> int:
    """Of all tensors of two checkpoints."""
    assert ours.keys() == expected.keys()
    pairs = [(ours[name].flatten(), expected[name].flatten()) for name in ours]
    return sum(int((a.view(torch.uint8) != b.view(torch.uint8)).sum()) for a, b in pairs)


def results(trainer: "Trainer") -> list[dict[str, Any]]:
    """The rows of metrics.jsonl, without what only says how fast they came."""
    return [{key: row[key] for key in row.keys() - SPEEDS} for row in trainer.rows]


def lines_with(text: str, *words: str) -> list[str]:
    return [line for line in text.splitlines() if all(word in line for word in words)]


def torchrun(ranks: int) -> tuple[str, ...]:
    return ("torchrun", "--standalone", "--nproc-per-node", str(ranks))


def ranks_of(count: int) -> tuple[str, ...]:
    """A launcher that starts in no time: for what the launcher has no part in."""
    return (sys.executable, str(RANKS), str(count))


TWO = ranks_of(2)
