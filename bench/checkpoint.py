"""Measure what checkpoints cost: how long a save stops training, and how fast they go to and from the disk.

python -m bench.checkpoint
python -m bench.checkpoint --elements 30e6 --steps 60 --every 20
"""

import argparse
import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

import torch
from torch import Tensor

from bench.kernels import machine
from bench.kernels.machine import ROOT
from bench.kernels.results import RESULTS
from bench.throughput.report import write
from fastjepa.engine.checkpoints.checkpoint import Position, checkpoint_path, load_checkpoint, state_of
from fastjepa.engine.checkpoints.keep import Keep
from fastjepa.engine.checkpoints.saver import Job, Saver
from fastjepa.engine.checkpoints.verify import verify_checkpoint
from fastjepa.engine.learner import Learner
from fastjepa.engine.partitions import FlatLayout, Partition, Parts, Slice
from fastjepa.engine.run import Run

FILES = ("student", "target", "exp_avg", "exp_avg_sq")
VIT_LARGE = 304_000_000  # elements: 1.2 GB of fp32
MATRIX = (1024, 4096)  # of the MLP of ViT-L
BLOCK = 2**24  # bytes that the disk is read and written by, when it is measured


@dataclass(frozen=True)
class Stall:
    """What saves cost a run.

    Attributes:
        save_ms: how long each stopped training.
        step_ms: a step of training, the time of saves left out.
        share: of the median save in the time between saves, at `run.save_every` of the recipe.
        save_every: steps.
    """

    save_ms: list[float]
    step_ms: float
    share: float
    save_every: int


@dataclass(frozen=True)
class Round:
    """Seconds for the same number of bytes, nothing of it in the page cache."""

    disk_write_s: float
    save_s: float
    stalled_s: float  # of save_s, while training would have waited
    disk_read_s: float
    verify_s: float
    load_s: float


def measure_stall(folder: Path, steps: int, every: int) -> Stall:
    """Train the recipe of Fashion-MNIST for some steps, and time `Run.save`."""
    from fastjepa.config import load_config
    from fastjepa.train import main

    recipe = ROOT / "configs" / "fashion_mnist.yaml"
    save_every = load_config(recipe).run.save_every
    spent: list[float] = []
    save, advance, ends = Run.save, Run.advance, list[float]()

    def timed(run: Run, learner: Learner) -> None:
        before = time.perf_counter()
        save(run, learner)
        spent.append(time.perf_counter() - before)

    def noted(run: Run, *arguments: object) -> None:
        advance(run, *arguments)  # type: ignore[arg-type]
        ends.append(time.perf_counter())

    Run.save, Run.advance = timed, noted  # type: ignore[method-assign, assignment]
    try:
        code = main(
            [
                "--config", str(recipe), f"run.dir={folder}", f"run.save_every={every}", "run.log_every=1000",
                f"optim.steps={steps}", "optim.warmup_epochs=0", "probe.every_steps=0",
                "probe.final_bank=50", "probe.final_queries=50", "speed.device=cpu",
            ]
        )  # fmt: skip
    finally:
        Run.save, Run.advance = save, advance  # type: ignore[method-assign]
    assert code == 0, "the run failed"
    # Of a median step no save is a part, even where they are many.
    step_s = median(b - a for a, b in pairwise(ends))
    share = median(spent) / (median(spent) + save_every * step_s)
    return Stall([round(1e3 * s, 3) for s in spent], 1e3 * step_s, share, save_every)


def large_state(elements: int) -> tuple[dict[str, Parts], list[Tensor]]:
    """Matrices of a ViT-L, as one flat part for each file; all files are of the same memory."""
    size = MATRIX[0] * MATRIX[1]
    count = max(1, elements // size)
    whole = tuple(Slice(f"m.{i:03}", torch.Size(MATRIX), 0, i * size, size) for i in range(count))
    master = torch.randn(count * size)
    names = tuple(s.name for s in whole)
    partition = Partition(names, whole, master, master, FlatLayout(whole, master.numel(), 0))
    return {file: Parts([partition], [master]) for file in FILES}, [torch.empty_like(master)]


def measure_round(folder: Path, saver: Saver, state: dict[str, Parts], into: Tensor) -> Round:
    """Each thing once, each beside the disk's own speed at that moment."""
    (partition,) = state["student"].partitions
    total = len(FILES) * 4 * partition.master.numel()
    raw = folder / "raw"
    disk_write_s = seconds(lambda: write_raw(raw, total))
    before = time.perf_counter()
    saver.start(state, Job(folder, 1, state_of(Position(1, 0, 0.0, 0, 0), {}, {}), Keep(1)))
    stalled_s = time.perf_counter() - before
    failure = saver.wait()
    save_s = time.perf_counter() - before
    if failure is not None:
        raise failure
    drop(raw)
    disk_read_s = seconds(lambda: read_raw(raw))
    raw.unlink()
    path = checkpoint_path(folder, 1)
    for file in path.iterdir():
        drop(file)
    verify_s = seconds(lambda: verify_checkpoint(path))
    for file in path.iterdir():
        drop(file)

    def load() -> None:
        tensors = load_checkpoint(path).tensors
        for file in FILES:
            partition.take(tensors[file], into=into)

    load_s = seconds(load)
    assert torch.equal(into, partition.master), "it was not what had been saved"
    shutil.rmtree(path)
    return Round(disk_write_s, save_s, stalled_s, disk_read_s, verify_s, load_s)


def seconds(do: Callable[[], object]) -> float:
    before = time.perf_counter()
    do()
    return time.perf_counter() - before


def write_raw(path: Path, total: int) -> None:
    block = os.urandom(BLOCK)
    with path.open("wb", buffering=0) as stream:
        for begin in range(0, total, BLOCK):
            stream.write(block[: total - begin])
        os.fsync(stream.fileno())


def read_raw(path: Path) -> None:
    buffer = bytearray(BLOCK)
    with path.open("rb", buffering=0) as stream:
        while stream.readinto(buffer):
            pass


def drop(path: Path) -> None:
    """From the page cache."""
    with path.open("rb") as stream:
        os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def summary(bytes_each: float, stall: Stall, rounds: Sequence[Round]) -> dict[str, float]:
    """Medians, in words that stand by themselves."""
    first, *later = stall.save_ms
    of = {name: median(getattr(r, name) for r in rounds) for name in Round.__dataclass_fields__}
    disk_s = of["disk_write_s"] + 2 * of["disk_read_s"]
    return {
        "first_save_stall_ms": first,
        "save_stall_ms": median(later or [first]),
        "stall_share": stall.share,
        "save_gb_per_s": bytes_each / of["save_s"] / 1e9,
        "verify_gb_per_s": bytes_each / of["verify_s"] / 1e9,
        "load_gb_per_s": bytes_each / of["load_s"] / 1e9,
        "disk_write_gb_per_s": bytes_each / of["disk_write_s"] / 1e9,
        "disk_read_gb_per_s": bytes_each / of["disk_read_s"] / 1e9,
        "share_of_disk": disk_s / (of["save_s"] + of["verify_s"] + of["load_s"]),
        "large_stall_s": of["stalled_s"],
    }


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.checkpoint", description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=200, help="of the small run")
    parser.add_argument("--every", type=int, default=20, help="steps between its saves")
    parser.add_argument("--elements", type=float, default=VIT_LARGE, help="of each of four files")
    parser.add_argument(
        "--rounds", type=int, default=3, help="of the large state, of which the median counts"
    )
    parser.add_argument(
        "--folder", type=Path, help="on the disk to be measured; five times the state must fit"
    )
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    facts = machine.facts(torch.device("cpu")) | {"load_before": os.getloadavg()[0]}
    with TemporaryDirectory(prefix="checkpoint-", dir=options.folder, ignore_cleanup_errors=True) as below:
        folder = Path(below)
        stall = measure_stall(folder / "run", options.steps, options.every)
        state, (into,) = large_state(int(options.elements))
        saver = Saver(state, None)
        rounds = [measure_round(folder, saver, state, into) for _ in range(options.rounds)]
    bytes_each = len(FILES) * 4 * into.numel()
    found = summary(bytes_each, stall, rounds)
    content = facts | {"load_after": os.getloadavg()[0], "bytes": bytes_each, "summary": found}
    content |= {"stall": asdict(stall), "rounds": [asdict(r) for r in rounds]}
    path = options.results / "cpu" / f"checkpoint-{facts['date']}.json"
    write(path, json.dumps(content, indent=1) + "\n")
    for name, value in found.items():
        print(f"{name:22} {value:.4g}")
    print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
