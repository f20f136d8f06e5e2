"""What is in a tar shard: where each image lies, and what it is labelled.

The webdataset convention: members that share everything before the first dot of their last name are one
sample, and follow each other. `cat/0001.jpg` and `cat/0001.cls` are an image and its label.
"""

import json
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import groupby
from typing import BinaryIO

from fastjepa.data.folder import EXTENSIONS

_BLOCK = 512
_LABEL_BYTES = 1 << 20  # a label that is longer is none


class ShardError(ValueError):
    """A shard that cannot be indexed; the message names it and says what to do."""


@dataclass
class Found:
    """The images of one shard, in the order of their bytes.

    Attributes:
        names: of the tar members.
        offsets, sizes: in bytes.
        labels: None where there is none.
        without_image: samples in which there is none.
    """

    names: list[str] = field(default_factory=list)
    offsets: list[int] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    labels: list[int | None] = field(default_factory=list)
    without_image: int = 0


def scan_shard(stream: BinaryIO, shard: str, length: int, with_labels: bool = True) -> Found:
    """Read the headers of a shard, and its labels.

    Args:
        stream: the shard, at its beginning, which can seek.
        shard: its name, for messages.
        length: in bytes.
        with_labels: whether to look at `.cls` (a whole number) and `.json` (a `label` that is one).

    Raises:
        ShardError: it is truncated, compressed, no tar file, or holds a label that is none.
    """
    found = Found()
    try:
        with tarfile.open(fileobj=stream, mode="r:") as tar:
            members = (member for member in _members(tar, shard, length) if _is_wanted(member))
            for key, sample in groupby(members, lambda member: _split(member.name)[0]):
                _add(found, tar, shard, key, list(sample), with_labels)
    except tarfile.TarError as error:
        raise ShardError(
            f"{shard} cannot be read as a tar file ({error}). Shards are read by range and must not be "
            "compressed; if it was cut off, write or copy it again"
        ) from error
    return found


def _is_wanted(member: tarfile.TarInfo) -> bool:
    """A file, and none that tar on macOS puts beside every other, `._0001.jpg`, which is no image."""
    return member.isfile() and not member.name.rpartition("/")[2].startswith(".")


def _members(tar: tarfile.TarFile, shard: str, length: int) -> Iterator[tarfile.TarInfo]:
    for member in tar:
        if member.offset_data + member.size > length:
            raise ShardError(
                f"{shard} is truncated: {member.name} ends at byte {member.offset_data + member.size:,}, the "
                f"file at {length:,}; write or copy it again"
            )
        yield member
    # tarfile takes whatever follows a good member for the end. An archive ends with blocks of zeros.
    assert tar.fileobj is not None
    tar.fileobj.seek(tar.offset)
    if tar.fileobj.read(_BLOCK) != bytes(_BLOCK):
        raise ShardError(
            f"{shard} is truncated or damaged at byte {tar.offset:,}, where neither a member nor the end of "
            "the archive is; write or copy it again"
        )


def _add(
    found: Found,
    tar: tarfile.TarFile,
    shard: str,
    key: str,
    sample: list[tarfile.TarInfo],
    with_labels: bool,
) -> None:
    images = [member for member in sample if f".{_split(member.name)[1]}".endswith(EXTENSIONS)]
    label = None
    if with_labels and images:
        for member in sample:
            label = _label(tar, shard, member) if label is None else label
    found.without_image += not images
    for member in images:
        found.names.append(member.name)
        found.offsets.append(member.offset_data)
        found.sizes.append(member.size)
        found.labels.append(label)


def _split(name: str) -> tuple[str, str]:
    """Key and extension, lower case: "a/b.left.JPG" -> ("a/b", "left.jpg")."""
    folder, slash, last = name.rpartition("/")
    stem, _, extension = last.partition(".")
    return f"{folder}{slash}{stem}", extension.lower()


def _label(tar: tarfile.TarFile, shard: str, member: tarfile.TarInfo) -> int | None:
    extension = _split(member.name)[1]
    if extension not in ("cls", "json") or member.size > _LABEL_BYTES:
        return None
    stream = tar.extractfile(member)
    assert stream is not None  # of a regular file it never is
    text = stream.read().decode("utf-8", errors="replace").strip()
    if extension == "cls":
        if text.isdecimal():
            return int(text)
        raise ShardError(
            f"{shard}/{member.name} holds {text[:40]!r}; a .cls file holds the number of a class, from 0 on. "
            "Leave labels out with --no-labels"
        )
    try:
        content = json.loads(text)
    except ValueError as error:
        raise ShardError(
            f"{shard}/{member.name} is no JSON: {error}. Leave labels out with --no-labels"
        ) from error
    label = content.get("label") if isinstance(content, dict) else None
    if label is None:
        return None
    if isinstance(label, bool) or not isinstance(label, int) or label < 0:
        raise ShardError(
            f"{shard}/{member.name}: its label is {label!r}; it must be the number of a class, from 0 on. "
            "Leave labels out with --no-labels"
        )
    return label
