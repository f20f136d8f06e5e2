"""Pack a folder of images into shards."""

import os
import tarfile
from collections.abc import Callable
from contextlib import AbstractContextManager, closing, nullcontext
from io import BytesIO
from pathlib import Path

import torch

from fastjepa.data.folder import ImageFolder, check_no_splits
from fastjepa.data.packing.encode import Encoded, Encoder, Packing
from fastjepa.data.packing.journal import Entry, Journal, PackError, open_journal
from fastjepa.data.packing.report import Report, write_report
from fastjepa.data.shards.build import CLASSES_NAME, index_shards
from fastjepa.data.shards.index import INDEX_NAME, write_index
from fastjepa.data.workers import in_order
from fastjepa.masks.counter import Stream, random_words

Progress = Callable[[str, int, str], AbstractContextManager[Callable[[int], None]]]

_AT_A_TIME = 8  # images that a worker is given; one by one, half the time would go into passing them on
_TIMEOUT_S = 300.0
_BLOCK = 512
_ORDER_SEED = 0


def _quietly(what: str, total: int, unit: str) -> AbstractContextManager[Callable[[int], None]]:
    return nullcontext(lambda more: None)


def pack(
    folder: Path, out: Path, packing: Packing, workers: int = 0, progress: Progress = _quietly
) -> Report:
    """Write the images below `folder` into shards in `out`, their index, and a report of it.

    Members are called by the image's number in the folder, `00000042.jpg`, with its class in `00000042.cls`
    where there are classes, whose names are the lines of `classes.txt`. Killed, it goes on with the first
    shard that is not finished; no finished one is written again, and what is half written has no name ending
    in `.tar`.

    Args:
        folder: of images; class folders become labels.
        out: new, empty, or of this pack.
        packing: what decides about the content.
        workers: processes that decode and encode; 0 does it here.
        progress: a context manager for a bar, from what is done, how many there are, and of what.

    Raises:
        NotADirectoryError, ValueError: there is no such folder, no image below it, or parts of a data set.
        PackError: `out` cannot be used, a class has a line break in its name, or no image could be read.
        OSError: the drive fails or is full. What was finished stays, and the same call goes on.
    """
    images = ImageFolder(folder)
    check_no_splits(images)
    _check_lines(images)
    with open_journal(out, images, packing) as journal:
        if images.class_names is not None:
            _write_text(out / CLASSES_NAME, "".join(f"{name}\n" for name in images.class_names))
        order = _order(len(images), packing)
        done = journal.entries[-1].end if journal.entries else 0
        with progress("Packing", len(order), "images") as advance:
            advance(done)
            left = (part.tolist() for part in order[done:].split(_AT_A_TIME))
            encoded = in_order(
                Encoder(images, packing), left, workers=workers, describe=images.path, timeout_s=_TIMEOUT_S
            )
            with closing(encoded):
                writer = _Writer(journal, images, packing, done)
                for batch in encoded:
                    for image in batch:
                        writer.add(image)
                    advance(len(batch))
                writer.finish()
        report = Report.of(journal.entries, images)
        if not report.packed:
            raise PackError(
                f"none of the {len(images)} images in {folder} can be read; the first: {report.first}"
            )
        write_index(index_shards([str(out / e.shard) for e in journal.entries if e.images]), out / INDEX_NAME)
        write_report(report, out)
    return report


def _check_lines(images: ImageFolder) -> None:
    for name in images.class_names or ():
        if "\n" in name or "\r" in name:
            raise PackError(
                f"the name of the class folder {name!r} has a line break in it, and classes.txt holds a name "
                "in each line: rename the folder"
            )


def _order(images: int, packing: Packing) -> torch.Tensor:
    """int64 [images]. Shuffled, a shard holds of every class, and shuffling a few shards is enough."""
    if packing.in_order:
        return torch.arange(images)
    keys = random_words(_ORDER_SEED, Stream.IMAGE_ORDER, torch.arange(images), 0, 1)[:, 0]
    return keys.argsort(stable=True)


class _Writer:
    """Writes images into one shard after another."""

    def __init__(self, journal: Journal, images: ImageFolder, packing: Packing, done: int) -> None:
        self.journal, self.images, self.packing, self.at = journal, images, packing, done
        self._open()

    def _open(self) -> None:
        self.name = f"shard-{len(self.journal.entries):06d}.tar"
        self.half = self.journal.out / f"{self.name}.tmp"
        self.size = self.count = self.copied = 0
        self.skipped: dict[str, str] = {}
        self.tar: tarfile.TarFile | None = None

    def add(self, image: Encoded) -> None:
        members = []
        if image.content:
            members.append((f"{image.number:08d}.{image.extension}", image.content))
            if self.images.labels is not None:
                label = int(self.images.labels[image.number])
                members.append((f"{image.number:08d}.cls", str(label).encode()))
            size = sum(_BLOCK + -(-len(content) // _BLOCK) * _BLOCK for _, content in members)
            if self.count and _whole(self.size + size) > self.packing.shard_bytes:
                self.finish()
            self.size += size
            self.count += 1
            self.copied += image.is_copy
        else:
            self.skipped[self.images.path(image.number)] = image.reason
        for name, content in members:
            if self.tar is None:
                self.tar = tarfile.open(self.half, "w", format=tarfile.USTAR_FORMAT)  # noqa: SIM115
            member = tarfile.TarInfo(name)  # of no owner, and of the same time always: the same bytes
            member.size = len(content)
            self.tar.addfile(member, BytesIO(content))
        self.at += 1

    def finish(self) -> None:
        """Close the shard, see it on the disk, and begin the next."""
        if self.tar is None:
            if not self.skipped:
                return
            self.tar = tarfile.open(self.half, "w", format=tarfile.USTAR_FORMAT)  # noqa: SIM115
        self.tar.close()
        with self.half.open("rb") as file:
            os.fsync(file.fileno())
        size = self.half.stat().st_size
        self.journal.finish(self.half, Entry(self.name, self.at, size, self.count, self.copied, self.skipped))
        self._open()


def _whole(members: int) -> int:
    """Bytes of an archive of so many: two empty blocks end it, and zeros fill its last record."""
    return -(-(members + 2 * _BLOCK) // tarfile.RECORDSIZE) * tarfile.RECORDSIZE


def _write_text(path: Path, text: str) -> None:
    half = path.with_name(f"{path.name}.tmp")
    half.write_text(text, encoding="utf-8", errors="surrogateescape")  # names as the drive has them
    half.replace(path)
