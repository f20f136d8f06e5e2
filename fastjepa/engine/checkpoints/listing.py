"""Looking at the checkpoints of a run that may be under way: what there is, and what may go."""

import fcntl
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastjepa.engine.checkpoints.checkpoint import (
    MANIFEST,
    STATE,
    CheckpointError,
    OtherVersion,
    is_named,
    is_of_other_version,
    list_checkpoints,
    load_position,
    step_of,
)
from fastjepa.engine.checkpoints.keep import Keep, set_aside, superfluous
from fastjepa.engine.checkpoints.verify import damage_of
from fastjepa.engine.spikes import seen_within

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
        state: of its state.json; empty if that cannot be read here.
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
    path = path.resolve()  # the folder above "." is not "."
    for folder in (path / "checkpoints", path):
        if list_checkpoints(folder) or any(folder.glob("step_*.tmp")):
            return folder
    if is_checkpoint(path):
        return path.parent
    raise CheckpointError(f"no checkpoints in {path}: give the folder of a run, or its checkpoints/")


def is_checkpoint(path: Path) -> bool:
    """Whether a folder is one, perhaps a damaged one."""
    return path.is_dir() and (is_named(path) or (path / STATE).exists() or (path / MANIFEST).exists())


def describe(path: Path) -> Described | None:
    """Look at one checkpoint; None if it is gone, as a run deletes them while one looks."""
    try:
        written_s = path.stat().st_mtime
        sizes = {file.name: file.stat().st_size for file in path.iterdir()}
    except FileNotFoundError:
        return None
    try:
        manifest = json.loads((path / MANIFEST).read_text())
        lacks = tuple(n for n, entry in manifest.items() if sizes.get(n) != entry["bytes"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        lacks = (MANIFEST,)
    state: dict[str, Any] = {}
    try:
        state = load_position(path)[0]
    except OtherVersion:
        lacks = ("of another version",)
    except CheckpointError:
        lacks = lacks or (STATE,)
    return Described(path, step_of(path), written_s, sum(sizes.values()), lacks, state)


def keep_of(found: Sequence[Described]) -> Keep:
    """What the run of these checkpoints, newest first, keeps; the defaults if none of them says."""
    for checkpoint in found:
        run = checkpoint.state.get("config", {}).get("run", {})
        if isinstance(run.get("keep_last"), int):
            back = seen_within(run["log_every"]) if run.get("on_spike") == "rollback" else None
            return Keep(run["keep_last"], run.get("keep_every"), back)
    return Keep(2)


def table(found: Sequence[Described], now_s: float) -> list[str]:
    """A line for each checkpoint, newest first, below a heading."""
    steps = [checkpoint.step for checkpoint in found if not checkpoint.lacks]
    why = keep_of(found).reasons(steps)
    rows = [("step", "age", "size", "complete", "kept as", "written by")]
    for c in found:
        complete = f"no: {', '.join(c.lacks)}" if c.lacks else "yes"
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
    """What `keep` does not keep: of those that verify as many stay as it says, the newest of them always.

    Checkpoints are read from the newest on until so many are found; older ones may go unread.

    Raises:
        CheckpointError: none of them is good, so that nothing may go.
    """
    good: list[int] = []
    damaged: list[Path] = []
    notes: list[str] = []
    for path in list_checkpoints(directory):
        if len(good) == keep.last:
            break
        try:
            damage = damage_of(path)
        except OtherVersion as error:
            notes.append(f"{error}; it is left as it is")
            continue
        if not path.is_dir():  # a run has deleted it meanwhile
            continue
        if damage:
            damaged.append(path)
            notes += [f"{line}; left as it is" for line in damage]
        else:
            good.append(step_of(path))
    if not good and list_checkpoints(directory):
        raise CheckpointError(
            "; ".join([f"no checkpoint in {directory} is good: nothing is deleted", *notes])
        )
    go = superfluous(directory, good[0], keep, damaged) if good else []
    go = [path for path in go if not is_of_other_version(path)]
    return Pruning(go + sorted(directory.glob("step_*.tmp")), notes)


def carry_out(directory: Path, pruning: Pruning, *, dry_run: bool = False) -> Pruning:
    """Delete; a step_*.tmp only while it is certain that no run holds the folder, for it may be writing it.

    Returns:
        What went, or would, and notes on what did not.
    """
    gone, notes = [], list(pruning.notes)
    leftovers = [path for path in pruning.go if path.suffix == ".tmp"]
    for path in (path for path in pruning.go if path not in leftovers):
        if not dry_run:
            try:
                shutil.rmtree(set_aside(path))
            except FileNotFoundError:  # the run itself has deleted it
                if path.exists():
                    raise
                notes.append(f"{path} is gone already")
                continue
        gone.append(path)
    if not leftovers:
        return Pruning(gone, notes)
    going: list[Path] = []
    # A run that begins meanwhile has to wait for the lock: deleting them would take too long.
    with _lock_of(directory.parent) as why_not:
        if why_not is not None:
            notes += [f"{path} stays: {why_not}" for path in leftovers]
            return Pruning(gone, notes)
        for path in leftovers:
            with suppress(FileNotFoundError):  # a run that has ended since has deleted it
                if not dry_run:
                    going.append(_out_of_reach(path))
                gone.append(path)
    for path in going:
        shutil.rmtree(path, ignore_errors=True)  # a run that has begun since may delete it as well
        if path.exists():
            shutil.rmtree(path)
    return Pruning(gone, notes)


def _out_of_reach(leftover: Path) -> Path:
    """Give it a name that no run writes under, and which the next save clears away if this is killed."""
    return leftover.rename(leftover.with_name(f"{leftover.stem}.{os.getpid()}.tmp"))


@contextmanager
def _lock_of(run: Path) -> Iterator[str | None]:
    """None if no process trains in a run folder, and none begins to within; otherwise why that is not so."""
    file = run / ".lock"
    if not file.exists():
        yield (
            f"there is no {file} to tell whether a run is writing it; give the folder of the run, or delete "
            "it by hand if none is"
        )
        return
    with file.open("rb") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            yield f"a run is training in {run}"
            return
        except OSError as error:  # as drives answer that have no locks
            yield (
                f"{file} cannot be locked ({error.strerror}), so that nobody can tell whether a run is "
                "writing it; delete it by hand if none is"
            )
            return
        yield None
