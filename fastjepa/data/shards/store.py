"""Where shards lie: on this machine's drives, or behind a URL that fsspec knows."""

import os
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

# Descriptors held open by each process; the usual limit is 1,024, and connections need some too.
_OPEN_FILES = 128
_ASKED_AT_ONCE = 16  # shards whose size is asked of a store at the same time
_PAUSES_S = (0.5, 2.0, 8.0)  # between tries to reach a store

# What stores call the number that changes with a file's content, best first.
_MARKS = ("ETag", "etag", "md5Hash", "LastModified", "Last-Modified", "last_modified", "mtime", "updated")


class StoreError(OSError):
    """A store does not answer, or lacks what is asked of it; the message says which and what to do."""


@dataclass(frozen=True)
class Stamp:
    """What a shard was when it was indexed.

    Attributes:
        size: in bytes.
        mark: "mtime …" of a local file, "<field> …" of what a store says; empty if it says nothing.
    """

    size: int
    mark: str

    def differs(self, other: "Stamp") -> str:
        """In words; empty if they may be of one content. Marks of different kinds are not compared."""
        if self.size != other.size:
            return f"it has {other.size:,} bytes and had {self.size:,}"
        if self.mark.partition(" ")[0] == other.mark.partition(" ")[0] and self.mark != other.mark:
            return f"it is of the same size, but its {self.mark.partition(' ')[0]} is another"
        return ""


def is_url(place: str) -> bool:
    return "://" in place


def filesystem(url: str) -> tuple[Any, str]:
    """fsspec's file system of a URL, and the path in it; of this process, for connections cross no fork.

    Raises:
        StoreError: fsspec, or what it needs for this kind of URL, is not installed, or the kind is unknown.
    """
    try:
        import fsspec.core

        return fsspec.core.url_to_fs(url)
    except ImportError as error:
        kind = url.partition("://")[0]
        also = "" if kind in ("http", "https") else f", and what fsspec needs for {kind}:// ({error})"
        raise StoreError(f"{url} needs fsspec: pip install 'fastjepa[data]'{also}") from error
    except ValueError as error:  # a protocol that fsspec does not know
        raise StoreError(f"cannot open {url}: {error}") from error


def stamp_of(place: str) -> Stamp:
    """The present stamp of a shard.

    Raises:
        StoreError: it is not there, or its store does not say how long it is.
    """
    if not is_url(place):
        try:
            status = os.stat(place)
        except OSError as error:
            raise StoreError(f"cannot read the shard {place}: {error.strerror}") from error
        return Stamp(status.st_size, f"mtime {status.st_mtime_ns}")
    files, path = filesystem(place)
    info = _persistently(lambda: files.info(path), place)
    if info.get("size") is None:
        raise StoreError(f"{place}: its server does not say how long it is, so it cannot be read by range")
    mark = next((f"{name} {info[name]}" for name in _MARKS if info.get(name)), "")
    return Stamp(int(info["size"]), mark)


def stamps_of(places: Sequence[str]) -> list[Stamp]:
    """The stamps of many; those of stores are asked for several at a time."""
    if not any(map(is_url, places)):
        return [stamp_of(place) for place in places]
    with ThreadPoolExecutor(_ASKED_AT_ONCE) as threads:
        return list(threads.map(stamp_of, places))


def open_shard(place: str) -> BinaryIO:
    """A shard to be read through from its beginning.

    Raises:
        StoreError: it cannot be opened.
    """
    if not is_url(place):
        try:
            return open(place, "rb")
        except OSError as error:
            raise StoreError(f"cannot read the shard {place}: {error.strerror}") from error
    files, path = filesystem(place)
    opened: BinaryIO = _persistently(lambda: files.open(path, "rb"), place)
    return opened


def read_whole(place: str) -> bytes:
    """All of a file behind a URL. Raises StoreError."""
    files, path = filesystem(place)
    content: bytes = _persistently(lambda: files.cat_file(path), place)
    return content


@dataclass
class RangeReader:
    """Reads pieces of files, local ones through a few descriptors that stay open.

    Forked processes share the descriptors and no position in them, for every read says where.
    """

    _descriptors: OrderedDict[str, int] = field(default_factory=OrderedDict, repr=False)

    def read(self, place: str, offset: int, size: int) -> bytes:
        """`size` bytes from `offset` on; fewer where the file ends before.

        Raises:
            OSError: a local file cannot be read.
            StoreError: a store does not answer, tried four times, or gives more than the piece.
        """
        if not is_url(place):
            return self._pread(place, offset, size)
        files, path = filesystem(place)
        content: bytes = _persistently(lambda: files.cat_file(path, start=offset, end=offset + size), place)
        if len(content) > size:
            raise StoreError(
                f"{place}: {len(content):,} bytes came where {size:,} were asked for. Its server knows no "
                "range requests (python -m http.server does not): use one that does, or copy the shards here"
            )
        return content

    def _pread(self, place: str, offset: int, size: int) -> bytes:
        descriptor = self._descriptor(place)
        content = os.pread(descriptor, size, offset)
        while len(content) < size:  # network drives, and pieces above 2 GiB, may give less at a time
            more = os.pread(descriptor, size - len(content), offset + len(content))
            if not more:
                break
            content += more
        return content

    def _descriptor(self, place: str) -> int:
        if place in self._descriptors:
            self._descriptors.move_to_end(place)
            return self._descriptors[place]
        if len(self._descriptors) >= _OPEN_FILES:
            os.close(self._descriptors.popitem(last=False)[1])
        self._descriptors[place] = os.open(place, os.O_RDONLY)
        return self._descriptors[place]

    def close(self) -> None:
        while self._descriptors:
            os.close(self._descriptors.popitem()[1])

    def __del__(self) -> None:
        self.close()


def folder_of(place: str) -> str:
    """Where a file lies: a path without its last name, or such a URL."""
    return place.rpartition("/")[0] if is_url(place) else str(Path(place).parent)


def _persistently(ask: Callable[[], Any], place: str) -> Any:
    """Ask a store, again after a pause if it fails: a moment's trouble is no reason to end a run of days."""
    for pause_s in (*_PAUSES_S, None):
        try:
            return ask()
        except FileNotFoundError as error:
            raise StoreError(f"there is no {place}") from error
        except ImportError as error:  # fsspec imports what a kind of URL needs when it is used
            raise StoreError(f"{place} needs more than fsspec: {error}") from error
        except Exception as error:  # each kind of store has its own
            if pause_s is None:
                tries = len(_PAUSES_S) + 1
                raise StoreError(
                    f"cannot read {place}, tried {tries} times: {type(error).__name__}: {error}"
                ) from error
            time.sleep(pause_s)
