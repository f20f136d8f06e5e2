"""Whether a checkpoint is what was written: its files against the manifest, its name against its position.

The format is looked at first. What another version has written is no damage, whatever is in its files.
"""

import json
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path

from fastjepa.engine.checkpoints.checkpoint import (
    MANIFEST,
    STATE,
    CheckpointError,
    OtherVersion,
    list_checkpoints,
    load_position,
    read_state,
)
from fastjepa.engine.checkpoints.tensorfile import Fingerprint, fingerprint

_WRITTEN = (STATE, *(f"{file}.safetensors" for file in ("student", "target", "exp_avg", "exp_avg_sq")))


def newest_good(directory: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint that verifies, and a line about each newer one that does not.

    Raises:
        OtherVersion: before it comes one of another version, which going on from here would lose.
    """
    damaged: list[str] = []
    for path in list_checkpoints(directory):
        try:
            verify_checkpoint(path)
            return path, damaged
        except OtherVersion:
            raise
        except CheckpointError as error:
            damaged.append(str(error))
    return None, damaged


def verify_checkpoint(path: Path) -> None:
    """Compare every file of a checkpoint with the manifest.

    Raises:
        OtherVersion: it is of another format.
        CheckpointError: files are missing, changed or not vouched for, or it is under the name of another
            step; the message names them.
    """
    wrong = damage_of(path)
    if wrong:
        raise CheckpointError("; ".join(wrong))


def damage_of(path: Path) -> list[str]:
    """A line about each thing that is wrong with a checkpoint; every byte is read.

    Raises:
        OtherVersion: it is of another format, of which this version cannot say what is right.
    """
    manifest, wrong = _listed(path)
    wrong += [f"{path / name} is not in the manifest" for name in unlisted(path, manifest)]
    # Hashing is most of it, and leaves the others their turn.
    with ThreadPoolExecutor(min(8, len(manifest) or 1)) as threads:
        wrong += [line for line in threads.map(partial(_damage, path), manifest.items()) if line]
    if not wrong:
        try:
            load_position(path)
        except OtherVersion:
            raise
        except CheckpointError as error:
            wrong.append(str(error))
    return wrong


def has_damaged_files(path: Path) -> bool:
    """Whether files of a checkpoint are missing or changed, and nothing is there besides: it is of no use.

    Raises:
        OtherVersion: it is of another format.
    """
    manifest, wrong = _listed(path)
    if unlisted(path, manifest or dict.fromkeys(_WRITTEN)):
        return False
    return bool(wrong) or any(_damage(path, entry) for entry in manifest.items())


def _listed(path: Path) -> tuple[dict[str, Fingerprint], list[str]]:
    """The manifest, or what is wrong with it. The format comes first: another may have another manifest."""
    try:
        manifest = _read_manifest(path)
    except OSError as error:
        _check_format(path)
        return {}, [f"{path} is incomplete: {error}"]
    except (ValueError, AttributeError, TypeError, KeyError) as error:
        _check_format(path)
        return {}, [f"{path / MANIFEST} is damaged: {error}"]
    if _damage(path, (STATE, manifest[STATE])) is None:  # else what it says is not what was written
        _check_format(path)
    return manifest, []


def _check_format(path: Path) -> None:
    """Raises OtherVersion if state.json says so; whatever else is wrong with it is for others to say."""
    try:
        read_state(path)
    except OtherVersion:
        raise
    except CheckpointError:
        return


def unlisted(path: Path, manifest: Mapping[str, object]) -> list[str]:
    """What is in the folder of a checkpoint and not in its manifest."""
    with suppress(OSError):
        return sorted({file.name for file in path.iterdir()} - manifest.keys() - {MANIFEST})
    return []


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
