"""Checkpoints that are whole or not there: a directory of safetensors and JSON, renamed into place.

    step_00001000/
        student.safetensors        fp32 master weights by name
        target.safetensors         fp32 shadow of the target encoder (JEPA)
        exp_avg.safetensors        first and
        exp_avg_sq.safetensors     second moments of AdamW
        state.json                 position, configuration, versions
        manifest.json              size and sha256 of each of these files

Tensors go by the names of parameters, so neither the world size nor the ZeRO stage is part of a file.
Nothing in it is a pickle.
"""

import json
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from fastjepa.engine.checkpoints.tensorfile import Fingerprint, TensorFile, TensorFileError, fingerprint

FORMAT = 1
MANIFEST = "manifest.json"
STATE = "state.json"


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be used; the message names the file and what to do."""


@dataclass(frozen=True)
class Position:
    """Where a run is. All randomness is a function of it and of the seed.

    Attributes:
        step: optimizer steps done.
        images_seen: images consumed, over all ranks.
        train_s: seconds spent training.
        dataset_images: images in the training set, whose order the position refers to.
        micro_batch: images per rank and forward pass, on which masks of mode `truncate` depend.
        updates: optimizer steps that changed the weights, those skipped left out.
        losses: of the steps since the last log line, which the next one will average too.
        recent: of the steps before those, which a spike is held against.
        spike: the step of the last spike that was told of, counted from 1; 0 for none.
        rolled_back: the step of the last spike that the run went back for; 0 for none.
        passed_over: batches left out: step s reads the data of batch s + passed_over.
    """

    step: int
    images_seen: int
    train_s: float
    dataset_images: int
    micro_batch: int
    updates: int = 0
    losses: tuple[float, ...] = ()
    recent: tuple[float, ...] = ()
    spike: int = 0
    rolled_back: int = 0
    passed_over: int = 0


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint, opened: its tensors by file and name, read where they are looked at."""

    path: Path
    position: Position
    config: dict[str, Any]
    tensors: dict[str, TensorFile]  # student, exp_avg, exp_avg_sq, and target for JEPA


def checkpoint_path(directory: Path, step: int) -> Path:
    return directory / f"step_{step:08d}"


def state_of(
    position: Position,
    config: Mapping[str, Any],
    versions: Mapping[str, str],
    ranks: int = 1,
    zero_stage: int = 0,
) -> dict[str, Any]:
    """What state.json says: where the run is, and what wrote the checkpoint."""
    return {
        "format": FORMAT,
        "position": asdict(position),
        "config": dict(config),
        "versions": dict(versions),
        "ranks": ranks,
        "zero_stage": zero_stage,
    }


def list_checkpoints(directory: Path) -> list[Path]:
    """Complete checkpoints, newest first, not yet verified."""
    if not directory.is_dir():
        return []
    found = [p for p in directory.glob("step_*") if p.is_dir() and p.name.removeprefix("step_").isdigit()]
    return sorted(found, key=step_of, reverse=True)


def step_of(path: Path) -> int:
    """Of the path of a checkpoint."""
    return int(path.name.removeprefix("step_"))


def newest_good(directory: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint that verifies, and a line about each newer one that does not."""
    damaged: list[str] = []
    for path in list_checkpoints(directory):
        try:
            verify_checkpoint(path)
            return path, damaged
        except CheckpointError as error:
            damaged.append(str(error))
    return None, damaged


def verify_checkpoint(path: Path) -> None:
    """Compare every file of a checkpoint with the manifest.

    Raises:
        CheckpointError: files are missing, changed or not vouched for; the message names them.
    """
    wrong = damage_of(path)
    if wrong:
        raise CheckpointError("; ".join(wrong))


def damage_of(path: Path) -> list[str]:
    """A line about each file of a checkpoint that is not as its manifest says; every byte is read."""
    try:
        manifest = _read_manifest(path)
    except OSError as error:
        return [f"{path} is incomplete: {error}"]
    except (ValueError, AttributeError, TypeError, KeyError) as error:
        return [f"{path / MANIFEST} is damaged: {error}"]
    wrong = [f"{path / name} is not in the manifest" for name in sorted(_files_of(path) - manifest.keys())]
    # Hashing is most of it, and leaves the others their turn.
    with ThreadPoolExecutor(min(8, len(manifest))) as threads:
        return wrong + [line for line in threads.map(partial(_damage, path), manifest.items()) if line]


def _damage(path: Path, entry: tuple[str, Fingerprint]) -> str | None:
    name, expected = entry
    try:
        size = (path / name).stat().st_size
        if size != expected.bytes:
            return f"{path / name} is damaged: {size} bytes, {expected.bytes} in the manifest"
        if fingerprint(path / name) != expected:
            return f"{path / name} is damaged: it differs from the manifest"
    except OSError as error:
        return f"{path} is incomplete: {error}"
    return None


def _read_manifest(path: Path) -> dict[str, Fingerprint]:
    entries = json.loads((path / MANIFEST).read_text())
    manifest = {name: Fingerprint(entry["bytes"], entry["sha256"]) for name, entry in entries.items()}
    for name in (STATE, "student.safetensors"):
        if name not in manifest:
            raise ValueError(f"it does not list {name}")
    for name in manifest:
        if Path(name).name != name:
            raise ValueError(f"it lists {name}, which is no file of a checkpoint")
    return manifest


def _files_of(path: Path) -> set[str]:
    return {file.name for file in path.glob("*.safetensors")}


def read_state(path: Path) -> dict[str, Any]:
    """What state.json of a checkpoint says.

    Raises:
        CheckpointError: it is of an unknown format, or cannot be read.
    """
    file = path / STATE
    try:
        state: dict[str, Any] = json.loads(file.read_text())
        if state["format"] != FORMAT:
            raise CheckpointError(
                f"{path} has checkpoint format {state['format']}, this version reads {FORMAT}: use the "
                f"fastjepa that wrote it ({state['versions'].get('fastjepa', 'unknown')})"
            )
        return state
    except OSError as error:
        raise CheckpointError(f"{path} is incomplete: {error}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{file} is damaged: {error}") from error


def load_checkpoint(path: Path) -> Checkpoint:
    """Open a checkpoint, verified before. Its tensors are read where they are looked at.

    Raises:
        CheckpointError: it is of an unknown format, a file cannot be read or holds something else.
    """
    state = read_state(path)
    try:
        there = state["position"]
        lists = {"losses": tuple(there["losses"]), "recent": tuple(there.get("recent", ()))}
        position = Position(**there | lists)
        config = state["config"]
    except (KeyError, TypeError) as error:
        raise CheckpointError(f"{path / STATE} is damaged: {error}") from error
    try:
        tensors = {Path(name).stem: TensorFile(path / name) for name in sorted(_files_of(path))}
    except OSError as error:
        raise CheckpointError(f"{path} is incomplete: {error}") from error
    except TensorFileError as error:
        raise CheckpointError(f"{error}; take another checkpoint, or copy this one again") from error
    return Checkpoint(path, position, config, tensors)
