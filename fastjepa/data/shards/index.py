"""The index of a set of shards: one file that says where in which shard each image lies.

A safetensors file, mapped into memory: opening it reads next to nothing, and processes share its pages.
"""

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load, save
from torch import Tensor

from fastjepa.data.shards.store import Stamp, StoreError, folder_of, is_url, read_whole

INDEX_NAME = "index.safetensors"
_FORMAT = "fastjepa shards 1"


class IndexFileError(ValueError):
    """There is no index, or it cannot be used; the message says how to write one."""


@dataclass(frozen=True)
class ShardIndex:
    """N images in S shards, shard by shard, in the order of their bytes.

    Attributes:
        shards: paths or URLs, [S].
        stamps: of the shards when they were indexed, [S].
        shard_ends: int64 [S], how many images there are up to the end of each shard.
        offsets: int64 [N], of an image's first byte in its shard.
        sizes: int32 [N], bytes.
        names: uint8, the names of the tar members, one after another.
        name_ends: int64 [N], where in `names` each ends.
        labels: int32 [N], or None.
        class_names: of the labels, or None.
    """

    shards: tuple[str, ...]
    stamps: tuple[Stamp, ...]
    shard_ends: Tensor
    offsets: Tensor
    sizes: Tensor
    names: Tensor
    name_ends: Tensor
    labels: Tensor | None = None
    class_names: tuple[str, ...] | None = None

    def __len__(self) -> int:
        return len(self.offsets)

    def shard_of(self, image: int) -> int:
        return int(torch.searchsorted(self.shard_ends, image, right=True))

    def name(self, image: int) -> str:
        """Of the tar member."""
        start = int(self.name_ends[image - 1]) if image else 0
        return os.fsdecode(self.names[start : int(self.name_ends[image])].numpy().tobytes())


def write_index(index: ShardIndex, file: Path) -> None:
    """Write it; until it is whole, and on the disk, there is no file of that name, or the one before.

    Shards below the index's folder are noted relative to it, so that all may move together.
    """
    base = file.parent.resolve()
    places = [shard if is_url(shard) else _relative(Path(shard).resolve(), base) for shard in index.shards]
    described = [{"place": p, **asdict(s)} for p, s in zip(places, index.stamps, strict=True)]
    metadata = {"format": _FORMAT, "shards": json.dumps(described)}
    if index.class_names is not None:
        metadata["class_names"] = json.dumps(index.class_names)
    kinds = ("shard_ends", "offsets", "sizes", "names", "name_ends", "labels")
    tensors = {kind: getattr(index, kind) for kind in kinds if getattr(index, kind) is not None}
    half = file.with_name(f"{file.name}.tmp")
    try:
        with half.open("wb") as stream:  # safetensors' own would be for the eyes of one user
            stream.write(save(tensors, metadata))
            stream.flush()
            os.fsync(stream.fileno())
        half.replace(file)
    finally:
        half.unlink(missing_ok=True)


def _relative(shard: Path, base: Path) -> str:
    return str(shard.relative_to(base)) if shard.is_relative_to(base) else str(shard)


def read_index(root: str | Path) -> ShardIndex:
    """Open the index of a folder of shards.

    Args:
        root: the index, or the folder or URL that holds it under the name `index.safetensors`. One behind
            a URL is read into memory.

    Raises:
        IndexFileError: there is none, or it is no index.
    """
    place = _place_of(str(root))
    try:
        if is_url(place):
            content = read_whole(place)
            header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
            metadata, tensors = header.get("__metadata__", {}), load(content)
        else:
            with safe_open(place, framework="pt") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, ValueError, OSError) as error:
        if isinstance(error, StoreError):
            raise IndexFileError(f"no index of shards at {root}: {error}") from error
        raise IndexFileError(f"{place} is no index of shards ({error}); {_how_to_index(place)}") from error
    if metadata.get("format") != _FORMAT:
        raise IndexFileError(
            f"{place} is of the format {metadata.get('format')!r} and not {_FORMAT!r}; {_how_to_index(place)}"
        )
    shards = json.loads(metadata["shards"])
    names = json.loads(metadata["class_names"]) if "class_names" in metadata else None
    return ShardIndex(
        shards=tuple(_absolute(shard["place"], folder_of(place)) for shard in shards),
        stamps=tuple(Stamp(shard["size"], shard["mark"]) for shard in shards),
        class_names=None if names is None else tuple(names),
        **tensors,
    )


def _place_of(root: str) -> str:
    if is_url(root):
        return root if root.endswith(".safetensors") else f"{root.rstrip('/')}/{INDEX_NAME}"
    path = Path(root)
    if path.is_file():
        return root
    if not path.is_dir():
        raise IndexFileError(
            f"there is no {root}; data.root must be a folder of indexed shards, or their index"
        )
    if not (path / INDEX_NAME).is_file():
        if any(path.glob("*.tar")):
            raise IndexFileError(f"the shards in {root} have no index; {_how_to_index(root + '/x')}")
        raise IndexFileError(
            f"{root} holds no shards (*.tar). For a folder of images set data.name=folder, or pack it: "
            "fastjepa data pack FOLDER OUT"
        )
    return str(path / INDEX_NAME)


def _how_to_index(place: str) -> str:
    return f"write it with: fastjepa data index {folder_of(place)}/*.tar"


def _absolute(place: str, base: str) -> str:
    if is_url(place) or os.path.isabs(place):
        return place
    return f"{base}/{place}"


def shard_ends(counts: Sequence[int]) -> Tensor:
    """int64 [S], from how many images each shard holds."""
    return torch.tensor(counts, dtype=torch.int64).cumsum(0)
