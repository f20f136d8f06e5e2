"""Exports that are whole or not there, and take the place of nothing but an earlier export."""

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

MARKER = "fastjepa_export.json"  # in a folder that was exported: what it is, and which files are part of it


class ExportError(ValueError):
    """An export that is not made; the message says why and what to do."""


def check_place(out: Path, is_folder: bool, force: bool) -> None:
    """Refuse a place where something would be lost.

    Args:
        out: where the export is to go.
        is_folder: whether it is a folder; a file has its card beside it.
        force: replace a file, or a folder that was exported.

    Raises:
        ExportError: what is there, and what to do.
    """
    if not out.parent.is_dir():
        raise ExportError(f"there is no folder {out.parent} to write {out.name} into")
    if not is_folder:
        if out.is_dir():
            raise ExportError(
                f"cannot write {out}: it is a folder, and this format is one file; name another"
            )
        for path in (out, card_beside(out), data_beside(out)):
            if path.exists() and not force:
                raise ExportError(f"{path} exists; give another name, or --force to replace it")
        return
    if not os.path.lexists(out):
        return
    if not force:
        raise ExportError(f"{out} exists; give another name, or --force to replace it if it is an export")
    if out.is_symlink() or not out.is_dir():
        raise ExportError(f"cannot write {out}: it is no folder, and this format is one; give another name")
    known = _files_of_export(out)
    there = {path.relative_to(out).as_posix() for path in out.rglob("*") if not path.is_dir()}
    if there and known is None:
        raise ExportError(f"{out} is no earlier export, so it is not replaced; give another name")
    added = sorted(there - (known or set()))
    if added:
        raise ExportError(
            f"{out} holds {', '.join(added[:4])}{', …' if len(added) > 4 else ''} besides an earlier export: "
            "move that away, or give another name"
        )


def card_beside(out: Path) -> Path:
    """Where the card of a file goes."""
    return out.with_name(out.name + ".md")


def data_beside(out: Path) -> Path:
    """Where the weights of an ONNX model go that are more than its own file can hold, 2 GB."""
    return out.with_name(out.name + ".data")


def mark(folder: Path, says: dict[str, Any]) -> None:
    """Say in a folder that it is an export, and of which files."""
    files = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir())
    (folder / MARKER).write_text(json.dumps(says | {"files": [*files, MARKER]}, indent=1), encoding="utf-8")


@contextmanager
def staging(out: Path) -> Iterator[Path]:
    """A folder beside `out`, to write into; with all that is left in it, it is gone in the end."""
    folder = Path(tempfile.mkdtemp(prefix=f".{out.name}.", suffix=".tmp", dir=out.parent))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def place(staged: Path, out: Path) -> None:
    """Move what was staged to where it belongs: a folder `out`, or a file `out` after what goes with it."""
    usual = staged / ".usual"
    usual.touch()
    mode = usual.stat().st_mode  # safetensors makes files that nobody else may read
    usual.unlink()
    for path in staged.rglob("*"):
        if not path.is_dir():
            path.chmod(mode)
            _sync(path)
    if not (staged / out.name).is_dir():
        orphaned = _data_of(out) if not (staged / data_beside(out).name).exists() else None
        for path in sorted(staged.iterdir(), key=lambda path: path.name == out.name):
            os.replace(path, out.with_name(path.name))
        if orphaned is not None:
            orphaned.unlink(missing_ok=True)
        return
    before = staged / "before"  # goes with the staging folder
    if os.path.lexists(out):
        os.rename(out, before)
    try:
        os.rename(staged / out.name, out)
    except OSError:
        if before.exists():
            os.rename(before, out)
        raise


def _data_of(out: Path) -> Path | None:
    """The weights beside an ONNX file that is to be replaced, if they are its own: it names them."""
    beside = data_beside(out)
    try:
        is_named = out.suffix == ".onnx" and beside.is_file() and beside.name.encode() in out.read_bytes()
    except OSError:
        return None
    return beside if is_named else None


def _files_of_export(folder: Path) -> set[str] | None:
    """The files that the marker of an earlier export lists; None if there is no such marker."""
    try:
        files = json.loads((folder / MARKER).read_text(encoding="utf-8"))["files"]
        return {name for name in files if isinstance(name, str)}
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
