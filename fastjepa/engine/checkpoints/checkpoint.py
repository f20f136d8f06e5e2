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
import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, get_type_hints

from fastjepa.engine.checkpoints.tensorfile import TensorFile, TensorFileError

FORMAT = 1
MANIFEST = "manifest.json"
STATE = "state.json"
_WORDS = {int: "a whole number of at least 0", float: "a number of at least 0"}
_LIST = "a list of numbers"
_NAME = re.compile(r"step_(\d+)", re.ASCII)


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be used; the message names the file and what to do."""


class OtherVersion(CheckpointError):
    """A checkpoint of another version of fastjepa: good there, so it is neither passed over nor deleted."""


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
        dataset_checksum: of the names of some of those images; 0 if it is not known.
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
    dataset_checksum: int = 0

    def of_here(self, there: "Position") -> "Position":
        """The position of a checkpoint, taken up on the images and ranks of this one."""
        return replace(
            there,
            losses=(),
            dataset_images=self.dataset_images,
            dataset_checksum=self.dataset_checksum,
            micro_batch=self.micro_batch,
        )


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint, opened: its tensors by file and name, read where they are looked at."""

    path: Path
    position: Position
    config: dict[str, Any]
    tensors: dict[str, TensorFile]  # student, exp_avg, exp_avg_sq, and target for JEPA
    writer: str = "fastjepa"  # and its version


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
    found = [p for p in directory.glob("step_*") if is_named(p) and p.is_dir()]
    return sorted(found, key=step_of, reverse=True)


def is_named(path: Path) -> bool:
    """Whether the name of a path is that of a complete checkpoint."""
    return _NAME.fullmatch(path.name) is not None


def step_of(path: Path) -> int:
    """Of the path of a checkpoint."""
    return int(path.name.removeprefix("step_"))


def read_state(path: Path) -> dict[str, Any]:
    """What state.json of a checkpoint says.

    Raises:
        OtherVersion: it is of another format.
        CheckpointError: it cannot be read.
    """
    file = path / STATE
    try:
        state: dict[str, Any] = json.loads(file.read_text())
        if state["format"] != FORMAT:
            raise OtherVersion(
                f"{path} has checkpoint format {state['format']}, this version reads {FORMAT}: "
                f"{_use_writer(path, state)}"
            )
        return state
    except OSError as error:
        raise CheckpointError(f"{path} is incomplete: {error}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{file} is damaged: {error}") from error


def load_position(path: Path) -> tuple[dict[str, Any], Position]:
    """What state.json says, and where the run was, which must be where the name of the folder says.

    Raises:
        OtherVersion: it is of another format, or of a version that notes more of a run.
        CheckpointError: it cannot be read or holds something else, or it is of another step.
    """
    state, file = read_state(path), path / STATE
    there, hints = state.get("position"), get_type_hints(Position)
    if not isinstance(there, dict) or not isinstance(state.get("config"), dict):
        raise CheckpointError(f"{file} is damaged: it must hold a position and a config, each with keys")
    unknown = sorted(there.keys() - hints.keys())
    if unknown:
        raise OtherVersion(
            f"{file} has position.{unknown[0]}, which this version does not know: {_use_writer(path, state)}"
        )
    wrong = [
        f"position.{name} must be {_WORDS.get(hint, _LIST)}, got {there.get(name)!r}"
        for name, hint in hints.items()
        if (name in there or not hasattr(Position, name)) and not _is_of(hint, there.get(name))
    ]
    if wrong:
        raise CheckpointError(f"{file} is damaged: {'; '.join(wrong)}")
    values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in there.items()}
    position = Position(**values)
    if is_named(path) and step_of(path) != position.step:
        raise CheckpointError(
            f"{path} holds step {position.step}, as its {STATE} says, and not that of its name: rename it to "
            f"{checkpoint_path(path.parent, position.step).name}, or delete it"
        )
    return state, position


def is_of_other_version(path: Path) -> bool:
    """As far as the state.json of a checkpoint tells, which alone is read."""
    try:
        load_position(path)
    except OtherVersion:
        return True
    except CheckpointError:
        return False
    return False


def _is_of(kind: Any, value: object) -> bool:
    """Whether a JSON value is a count, a duration, or a list of losses."""
    if kind is int:
        return type(value) is int and value >= 0
    if kind is float:
        return type(value) in (int, float) and math.isfinite(value) and value >= 0  # type: ignore[arg-type,operator]
    return isinstance(value, list) and all(type(item) in (int, float) for item in value)


def _use_writer(path: Path, state: Mapping[str, Any]) -> str:
    return f"use the {_writer(state.get('versions'))} that wrote it, or move it out of {path.parent}"


def _writer(versions: object) -> str:
    version = versions.get("fastjepa") if isinstance(versions, dict) else None
    return "fastjepa" if version is None else f"fastjepa {version}"


def load_checkpoint(path: Path) -> Checkpoint:
    """Open a checkpoint, verified before. Its tensors are read where they are looked at.

    Raises:
        CheckpointError: as `load_position` does, or a file cannot be read or holds something else.
    """
    state, position = load_position(path)
    try:
        tensors = {file.stem: TensorFile(file) for file in sorted(path.glob("*.safetensors"))}
    except OSError as error:
        raise CheckpointError(f"{path} is incomplete: {error}") from error
    except TensorFileError as error:
        raise CheckpointError(f"{error}; take another checkpoint, or copy this one again") from error
    return Checkpoint(path, position, state["config"], tensors, _writer(state.get("versions")))
