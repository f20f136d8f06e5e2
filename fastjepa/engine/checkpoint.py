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

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from fastjepa.config import Config, differences, parse_config

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
    """

    step: int
    images_seen: int
    train_s: float
    dataset_images: int
    micro_batch: int
    updates: int = 0
    losses: tuple[float, ...] = ()


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint, its tensors loaded by name."""

    path: Path
    position: Position
    config: dict[str, Any]
    tensors: dict[str, dict[str, Tensor]]  # student, exp_avg, exp_avg_sq, and target for JEPA


def checkpoint_path(directory: Path, step: int) -> Path:
    return directory / f"step_{step:08d}"


def write_checkpoint(
    directory: Path,
    position: Position,
    config: Mapping[str, Any],
    tensors: Mapping[str, Mapping[str, Tensor]],
    versions: Mapping[str, str],
) -> Path:
    """Write a checkpoint under `directory`, complete and synced, or raise OSError and leave no trace."""
    final = checkpoint_path(directory, position.step)
    partial = final.with_suffix(".tmp")
    try:
        for stale in directory.glob("step_*.tmp"):  # of a run that was killed while it saved
            shutil.rmtree(stale, ignore_errors=True)
        partial.mkdir(parents=True)
        for name, named in tensors.items():
            try:
                save_file(dict(named), partial / f"{name}.safetensors")
            except SafetensorError as error:  # how safetensors reports a full disk
                raise OSError(f"writing {name}.safetensors: {error}") from error
        state = {
            "format": FORMAT,
            "position": asdict(position),
            "config": dict(config),
            "versions": dict(versions),
        }
        (partial / STATE).write_text(json.dumps(state, indent=1))
        manifest = {file.name: _fingerprint(file) for file in sorted(partial.iterdir())}
        (partial / MANIFEST).write_text(json.dumps(manifest, indent=1))
        for file in partial.iterdir():
            _sync(file)
        _sync(partial)
        shutil.rmtree(final, ignore_errors=True)  # a damaged one of the same step
        partial.rename(final)
        _sync(directory)
    except OSError:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return final


def keep_newest(directory: Path, step: int, count: int) -> None:
    """Delete all checkpoints but the `count` newest up to `step`; later ones are damaged and do not count."""
    present = [path for path in list_checkpoints(directory) if _step_of(path) <= step]
    for path in present[count:]:
        shutil.rmtree(path, ignore_errors=True)


def list_checkpoints(directory: Path) -> list[Path]:
    """Complete checkpoints, newest first, not yet verified."""
    if not directory.is_dir():
        return []
    found = [p for p in directory.glob("step_*") if p.is_dir() and p.name.removeprefix("step_").isdigit()]
    return sorted(found, key=_step_of, reverse=True)


def _step_of(path: Path) -> int:
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
        CheckpointError: a file is missing or changed; the message names it.
    """
    try:
        manifest = json.loads((path / MANIFEST).read_text())
        for name in (STATE, "student.safetensors"):
            if name not in manifest:
                raise CheckpointError(f"{path / MANIFEST} is damaged: it does not list {name}")
        for name, expected in manifest.items():
            if _fingerprint(path / name) != expected:
                raise CheckpointError(f"{path / name} is damaged: it differs from the manifest")
    except OSError as error:
        raise CheckpointError(f"{path} is incomplete: {error}") from error
    except (ValueError, AttributeError, TypeError) as error:
        raise CheckpointError(f"{path / MANIFEST} is damaged: {error}") from error


def load_checkpoint(path: Path) -> Checkpoint:
    """Load a checkpoint, verified before.

    Raises:
        CheckpointError: it is of an unknown format, or a file cannot be read.
    """
    file = path / STATE
    try:
        state = json.loads(file.read_text())
        if state["format"] != FORMAT:
            raise CheckpointError(
                f"{path} has checkpoint format {state['format']}, this version reads {FORMAT}: use the "
                f"fastjepa that wrote it ({state['versions'].get('fastjepa', 'unknown')})"
            )
        position = Position(**state["position"] | {"losses": tuple(state["position"]["losses"])})
        tensors = {}
        for file in sorted(path.glob("*.safetensors")):
            tensors[file.stem] = load_file(file)
        return Checkpoint(path, position, state["config"], tensors)
    except OSError as error:
        raise CheckpointError(f"{path} is incomplete: {error}") from error
    except (ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
        raise CheckpointError(f"{file} is damaged: {error}") from error


def check_continues(checkpoint: Checkpoint, start: Position, config: Config) -> None:
    """See that a run would go on from `checkpoint` as if it had never stopped.

    Args:
        checkpoint: the newest good one of the run's folder.
        start: where a fresh run of the configuration, on these images and ranks, begins.
        config: what the run is asked to be now.

    Raises:
        CheckpointError: settings that change results differ, or the images or micro-batches do.
    """
    there = checkpoint.position
    elsewhere = f"or start in another run.dir with run.init_from={checkpoint.path}"
    changed = differences(parse_config(checkpoint.config).results_part(), config.results_part())
    if changed:
        listing = "".join(f"\n  {line}" for line in changed)
        raise CheckpointError(
            f"{checkpoint.path} is of other settings (there -> here): use those, {elsewhere}{listing}"
        )
    if there.dataset_images != start.dataset_images:
        raise CheckpointError(
            f"{checkpoint.path} was trained on a set of {there.dataset_images} images, here are "
            f"{start.dataset_images}: the order of images would change; give data.root the same images, "
            f"{elsewhere}"
        )
    if there.micro_batch != start.micro_batch and config.masks.mode == "truncate":
        raise CheckpointError(
            f"{checkpoint.path} was trained on micro-batches of {there.micro_batch} images, here they have "
            f"{start.micro_batch}, and masks.mode truncate cuts contexts to the shortest in each: set "
            f"speed.accumulation to make them {there.micro_batch} again, {elsewhere}"
        )


def _fingerprint(file: Path) -> dict[str, int | str]:
    with file.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    return {"bytes": file.stat().st_size, "sha256": digest}


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
