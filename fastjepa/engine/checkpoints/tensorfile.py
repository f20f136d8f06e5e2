"""Files of fp32 tensors in the safetensors format: written piece by piece, read where one looks.

    8 bytes        length of the header, little endian
    header         JSON {name: {"dtype": "F32", "shape": […], "data_offsets": [begin, end]}}, then spaces
    data           the tensors one after another

https://github.com/huggingface/safetensors#format. Such a file holds no code: reading it runs nothing.
"""

import hashlib
import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError, safe_open
from torch import Tensor

_ALIGNED = 8  # bytes, which the data begins at a multiple of
_ITEM = 4  # bytes of an fp32 element
_READ = 2**22  # bytes that are hashed at a time
# How files begin that torch.save (zip, or pickle alone) and pickle.dump write.
_PICKLES = (b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")


class TensorFileError(ValueError):
    """A file that is not what it should be; the message names it, and a tensor where it is one."""


class Fingerprint(NamedTuple):
    """What tells a file from a damaged one."""

    bytes: int
    sha256: str


def header_of(shapes: Mapping[str, Sequence[int]]) -> bytes:
    """What a file of fp32 tensors begins with; after it come their elements, in this order."""
    entries: dict[str, Any] = {}
    end = 0
    for name, shape in shapes.items():
        begin, end = end, end + _ITEM * math.prod(shape)
        entries[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % _ALIGNED)
    return len(text).to_bytes(8, "little") + text


class HashedFile:
    """A file that is written once from its beginning to its end, hashed on the way.

    Raises:
        OSError: from every method: the disk is full, the file cannot be made, and so on.
    """

    def __init__(self, path: Path) -> None:
        # Without a buffer: a worker forked meanwhile would have a copy of it, and might write that too.
        self._stream = path.open("wb", buffering=0)
        self._hash = hashlib.sha256()
        self._bytes = 0

    def write(self, pieces: Iterable[bytes | memoryview]) -> None:
        for piece in pieces:
            self._hash.update(piece)
            self._bytes += len(piece)
            left = memoryview(piece)
            while left:
                left = left[self._stream.write(left) :]

    def finish(self) -> Fingerprint:
        """Have it on the disk, and close it."""
        os.fsync(self._stream.fileno())
        self._stream.close()
        return Fingerprint(self._bytes, self._hash.hexdigest())

    def abandon(self) -> None:
        with suppress(OSError):  # as drives behind a network may say so late
            self._stream.close()


def fingerprint(path: Path) -> Fingerprint:
    """Of a file as it is; OSError if it cannot be read."""
    digest, total, buffer = hashlib.sha256(), 0, memoryview(bytearray(_READ))
    with path.open("rb", buffering=0) as stream:
        while count := stream.readinto(buffer):
            digest.update(buffer[:count])
            total += count
    return Fingerprint(total, digest.hexdigest())


class TensorFile(Mapping[str, Tensor]):
    """The fp32 tensors of a file by name, mapped into memory: only what is looked at is read.

    Raises:
        TensorFileError: it is no such file, or a tensor in it is not of fp32.
        OSError: it is not there or cannot be opened.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with path.open("rb") as stream:
            begins = stream.read(4)
        if begins.startswith(_PICKLES):
            raise TensorFileError(
                f"{path} is a pickle, or a zip of pickles as torch.save writes it: not opened"
            )
        try:
            self._file = safe_open(path, framework="pt")
            slices = {name: self._file.get_slice(name) for name in self._file.keys()}  # noqa: SIM118
        except SafetensorError as error:
            raise TensorFileError(f"{path} is no safetensors file: {error}") from error
        for name, found in slices.items():
            if found.get_dtype() != "F32":
                raise TensorFileError(f"{path}: {name} is of dtype {found.get_dtype()}, expected F32")
        self.shapes = {name: tuple(found.get_shape()) for name, found in slices.items()}

    def __getitem__(self, name: str) -> Tensor:
        """A view of the mapped file; changing it changes no file."""
        if name not in self.shapes:
            raise KeyError(name)
        return self._file.get_tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)
