"""What a pack has done so far, so that it can be killed at any moment and go on."""

import errno
import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from fastjepa.data.folder import ImageFolder
from fastjepa.data.packing.encode import Packing

JOB_NAME, JOURNAL_NAME = "pack.json", "packed.jsonl"


class PackError(ValueError):
    """A folder that a pack cannot be written into; the message says what to do."""


@dataclass(frozen=True)
class Entry:
    """One finished shard.

    Attributes:
        shard: its name.
        end: places in the order of the pack up to its end.
        size: bytes of the shard.
        images: in it.
        copied: of them, byte for byte.
        skipped: path -> reason, of images that would have been in it, or after the last one.
    """

    shard: str
    end: int
    size: int
    images: int
    copied: int
    skipped: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Journal:
    """The folder of a pack, and its finished shards."""

    out: Path
    entries: list[Entry]

    def finish(self, half: Path, entry: Entry) -> None:
        """Give a shard that is on the disk its name. It is noted first: see `_settle`."""
        with (self.out / JOURNAL_NAME).open("a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(entry)) + "\n")
            file.flush()
            os.fsync(file.fileno())
        half.rename(self.out / entry.shard)
        self.entries.append(entry)


@contextmanager
def open_journal(out: Path, images: ImageFolder, packing: Packing) -> Iterator[Journal]:
    """The journal of a pack into `out`, new or begun; no other process has it meanwhile.

    Raises:
        PackError: `out` is not of this pack, or lacks a shard that was finished; or another is at work in it.
        OSError: it cannot be written to.
    """
    job = {**asdict(packing), "folder": os.fsdecode(os.path.abspath(images.root)), "images": len(images)}
    job["names"] = images.fingerprint()
    out.mkdir(parents=True, exist_ok=True)
    path = out / JOB_NAME
    if not path.exists():
        half = path.with_name(f"{JOB_NAME}.tmp")
        if any(there != half for there in out.iterdir()):  # killed at once, it leaves that
            raise PackError(f"{out} is not empty and holds no pack that was begun; give a new folder")
        half.write_text(json.dumps(job, indent=1) + "\n", encoding="utf-8")
        half.replace(path)
    with path.open("r+", encoding="utf-8") as lock:
        try:
            # Not flock: workers would inherit it, and hold it for a moment after this process is killed.
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EAGAIN):  # a drive that has no locks
                raise
            raise PackError(f"another process is packing into {out}") from error
        _check_same(out, json.load(lock), job)
        yield Journal(out, _settle(out, list(_read(out / JOURNAL_NAME))))


def _check_same(out: Path, begun: dict[str, Any], job: dict[str, Any]) -> None:
    changed = [
        f"{key} was {begun.get(key)!r}, is {value!r}" for key, value in job.items() if begun.get(key) != value
    ]
    if not changed:
        return
    if changed[0].startswith(("images", "names")):
        raise PackError(
            f"the images in {job['folder']} are others than when the pack into {out} was begun: pack into "
            "a new folder"
        )
    raise PackError(
        f"{out} holds a pack that was begun otherwise: {'; '.join(changed)}. Use the same settings, or a "
        "new folder"
    )


def _read(path: Path) -> Iterator[Entry]:
    if not path.exists():
        return
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    whole = [line for line in lines if line.endswith("\n")]
    if len(whole) != len(lines):  # it was killed while it wrote the last one
        half = path.with_name(f"{path.name}.tmp")
        half.write_text("".join(whole), encoding="utf-8")
        half.replace(path)
    yield from (Entry(**json.loads(line)) for line in whole)


def _settle(out: Path, entries: list[Entry]) -> list[Entry]:
    """A pack that was killed between noting a shard and naming it has it whole, under its other name."""
    for entry in entries:
        shard, half = out / entry.shard, out / f"{entry.shard}.tmp"
        if not shard.exists() and half.exists() and entry is entries[-1]:
            half.rename(shard)
        if not shard.exists() or shard.stat().st_size != entry.size:
            raise PackError(f"{shard} is missing or not what was packed; pack into a new folder")
    return entries
