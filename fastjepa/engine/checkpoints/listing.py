"""Looking at the checkpoints of a run that may be under way: what there is, and what may go."""

import fcntl
import json
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastjepa.engine.checkpoints.checkpoint import (
    MANIFEST,
    STATE,
    CheckpointError,
    damage_of,
    list_checkpoints,
    read_state,
    step_of,
)
from fastjepa.engine.checkpoints.keep import Keep, set_aside, superfluous

_MINUTE_S, _HOUR_S, _DAY_S = 60, 3600, 86_400


@dataclass(frozen=True)
class Described:
    """A checkpoint, as far as a look at it tells without reading its tensors.

    Attributes:
        path: of it.
        step: optimizer steps done.
        written_s: when, in seconds since 1970.
        bytes: of all its files.
        lacks: what its manifest lists and is not there, or not of that size; empty if it is complete.
        state: of its state.json; empty if that cannot be read.
    """

    path: Path
    step: int
    written_s: float
    bytes: int
    lacks: tuple[str, ...]
    state: dict[str, Any]

    @property
    def writer(self) -> str:
        """What wrote it, in words."""
        if not self.state:
            return "unknown"
        ranks, stage = self.state.get("ranks"), self.state.get("zero_stage")
        of_ranks = [] if ranks is None else [f"{ranks} rank{'s' * (ranks != 1)}, ZeRO {stage}"]
        return ", ".join([*of_ranks, *(f"{n} {v}" for n, v in self.state.get("versions", {}).items())])


def checkpoints_of(path: Path) -> Path:
    """The folder of checkpoints that is meant by a run folder, that folder, or one checkpoint in it.

    Raises:
        CheckpointError: there is none.
    """
    for folder in (path / "checkpoints", path):
        if list_checkpoints(folder) or any(folder.glob("step_*.tmp")):
            return folder
    if (path / STATE).exists() or (path / MANIFEST).exists():
        return path.parent
    raise CheckpointError(f"no checkpoints in {path}: give the folder of a run, or its checkpoints/")


def describe(path: Path) -> Described:
    """Look at one checkpoint."""
    sizes = {file.name: file.stat().st_size for file in path.iterdir()}
    try:
        manifest = json.loads((path / MANIFEST).read_text())
        lacks = tuple(n for n, entry in manifest.items() if sizes.get(n) != entry["bytes"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        lacks = (MANIFEST,)
    try:
        state = read_state(path)
    except CheckpointError:
        state = {}
    return Described(path, step_of(path), path.stat().st_mtime, sum(sizes.values()), lacks, state)


def keep_of(found: Sequence[Described]) -> Keep:
    """What the run of these checkpoints, newest first, keeps; the defaults if none of them says."""
    for checkpoint in found:
        run = checkpoint.state.get("config", {}).get("run", {})
        if isinstance(run.get("keep_last"), int):
            return Keep(run["keep_last"], run.get("keep_every"))
    return Keep(2)


def table(found: Sequence[Described], now_s: float) -> list[str]:
    """A line for each checkpoint, newest first, below a heading."""
    steps = [checkpoint.step for checkpoint in found if not checkpoint.lacks]
    why = keep_of(found).reasons(steps)
    rows = [("step", "age", "size", "complete", "kept as", "written by")]
    for c in found:
        complete = "yes" if not c.lacks else f"no: {', '.join(c.lacks)}"
        age, size = age_of(now_s - c.written_s), f"{c.bytes / 1e6:,.1f} MB"
        rows.append((str(c.step), age, size, complete, why.get(c.step, "-"), c.writer))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(f"{cell:{width}}" for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    ]


def age_of(seconds: float) -> str:
    """In its largest unit."""
    for unit, size in (("d", _DAY_S), ("h", _HOUR_S), ("min", _MINUTE_S)):
        if seconds >= size:
            return f"{seconds / size:.0f} {unit}"
    return f"{max(0, seconds):.0f} s"


@dataclass(frozen=True)
class Pruning:
    """What may go.

    Attributes:
        go: checkpoints and leftovers.
        notes: what stays though it looks as if it should not, and why.
    """

    go: list[Path]
    notes: list[str]


def plan_pruning(directory: Path, keep: Keep) -> Pruning:
    """What `keep` does not keep, up to the newest checkpoint that verifies; that one always stays.

    Raises:
        CheckpointError: none of them is good, so that nothing may go.
    """
    notes: list[str] = []
    newest = None
    for path in list_checkpoints(directory):
        damage = damage_of(path)
        if not damage:
            newest = path
            break
        notes += [f"{line}; left as it is" for line in damage]
    if newest is None and list_checkpoints(directory):
        raise CheckpointError(
            "; ".join([f"no checkpoint in {directory} is good: nothing is deleted", *notes])
        )
    go = [] if newest is None else superfluous(directory, step_of(newest), keep)
    return Pruning(go + sorted(directory.glob("step_*.tmp")), notes)


def carry_out(directory: Path, pruning: Pruning, *, dry_run: bool = False) -> Pruning:
    """Delete; a step_*.tmp only while no run holds the folder, for it may be writing it.

    Returns:
        What went, or would, and notes on what did not.
    """
    gone, notes = [], list(pruning.notes)
    with _lock_of(directory.parent) as is_free:
        for path in pruning.go:
            if path.suffix == ".tmp" and not is_free:
                notes.append(f"{path} stays: a run is training in {directory.parent}")
                continue
            if not dry_run:
                shutil.rmtree(set_aside(path))
            gone.append(path)
    return Pruning(gone, notes)


@contextmanager
def _lock_of(run: Path) -> Iterator[bool]:
    """Whether no process trains in a run folder. Within it none begins to, if so."""
    file = run / ".lock"
    if not file.exists():
        yield True
        return
    with file.open("rb") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        yield True
