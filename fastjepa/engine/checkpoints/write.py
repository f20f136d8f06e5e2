"""Writing checkpoints: into step_N.tmp, hashed on the way and synced, and only then renamed."""

import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor

from fastjepa.engine.checkpoints.checkpoint import MANIFEST, STATE, CheckpointError, checkpoint_path
from fastjepa.engine.checkpoints.keep import put_away
from fastjepa.engine.checkpoints.plan import Shapes
from fastjepa.engine.checkpoints.tensorfile import Fingerprint, HashedFile, header_of
from fastjepa.engine.checkpoints.verify import has_damaged_files

Array = npt.NDArray[np.float32]
_MANY = 64  # arrays, beyond which joining them costs less than a call to the system for each


class CheckpointWriter:
    """A checkpoint on its way to the disk. `writing` makes one and sees that it leaves no trace if it fails.

    Each file has a thread: while one piece of it is hashed and written, the next may come, and those of the
    other files. Methods raise OSError where the disk is full or fails.

    Args:
        directory: of all checkpoints.
        step: of this one.
        shapes: of each file, by its name without `.safetensors`, of each tensor in its order.
    """

    def __init__(self, directory: Path, step: int, shapes: Mapping[str, Shapes]) -> None:
        self.final = checkpoint_path(directory, step)
        self._partial = self.final.with_suffix(".tmp")
        self._files: dict[str, HashedFile] = {}
        self._threads = {name: ThreadPoolExecutor(1, f"write {name}") for name in shapes}
        self._shapes = shapes

    def write(self, file: str, arrays: Sequence[Array]) -> Future[None]:
        """Append contiguous fp32 arrays to a file; they may not change until the result is there."""
        if not self._files:
            self._open()
        return self._threads[file].submit(_append, self._files[file], arrays)

    def finish(self, state: Mapping[str, Any]) -> Path:
        """Sync everything, with `state` and a manifest beside the tensors, and give it its name."""
        closing = [self._threads[name].submit(file.finish) for name, file in self._files.items()]
        found = dict(zip(self._files, (future.result() for future in closing), strict=True))
        manifest = {f"{name}.safetensors": fingerprint for name, fingerprint in found.items()}
        manifest[STATE] = self._write_json(STATE, state)
        entries = {name: fingerprint._asdict() for name, fingerprint in sorted(manifest.items())}
        self._write_json(MANIFEST, entries)
        sync(self._partial)
        _make_way(self.final)
        self._partial.rename(self.final)
        sync(self.final.parent)
        return self.final

    def close(self) -> None:
        """End the threads; what is not finished goes away."""
        for thread in self._threads.values():
            thread.shutdown(cancel_futures=True)
        for file in self._files.values():
            file.abandon()
        shutil.rmtree(self._partial, ignore_errors=True)

    def _open(self) -> None:
        for stale in self.final.parent.glob("step_*.tmp"):  # of a run that was killed while it saved
            shutil.rmtree(stale, ignore_errors=True)
        make_folder(self._partial.parent)
        self._partial.mkdir()
        for name, shapes in self._shapes.items():
            self._files[name] = HashedFile(self._partial / f"{name}.safetensors")
            self._files[name].write([header_of(shapes)])

    def _write_json(self, name: str, content: Mapping[str, Any]) -> Fingerprint:
        file = HashedFile(self._partial / name)
        try:
            file.write([json.dumps(content, indent=1).encode()])
            return file.finish()
        finally:
            file.abandon()


@contextmanager
def writing(directory: Path, step: int, shapes: Mapping[str, Shapes]) -> Iterator[CheckpointWriter]:
    """A checkpoint to be written and finished within; otherwise nothing of it stays."""
    writer = CheckpointWriter(directory, step, shapes)
    try:
        yield writer
    finally:
        writer.close()


def write_checkpoint(
    directory: Path, step: int, state: Mapping[str, Any], tensors: Mapping[str, Mapping[str, Tensor]]
) -> Path:
    """Write fp32 tensors that are all in memory, by file and name; OSError leaves no trace."""
    shapes = {file: {name: t.shape for name, t in named.items()} for file, named in tensors.items()}
    with writing(directory, step, shapes) as writer:
        for file, named in tensors.items():
            writer.write(file, [t.contiguous().view(-1).numpy() for t in named.values()]).result()
        return writer.finish(state)


def _append(file: HashedFile, arrays: Sequence[Array]) -> None:
    if len(arrays) > _MANY:
        arrays = [np.concatenate(arrays)]
    file.write(array.data.cast("B") for array in arrays)


def make_folder(path: Path) -> None:
    """Make a folder and those above it, so that a crash of the machine does not lose them again.

    Raises:
        OSError: it cannot be made.
    """
    missing = [folder for folder in (path, *path.parents) if not folder.exists()]
    path.mkdir(parents=True, exist_ok=True)
    for made in reversed(missing):
        sync(made.parent)  # where its name is


def _make_way(path: Path) -> None:
    """Free the name of a checkpoint: a damaged one of the same step goes, whatever else is there is kept."""
    if not path.exists() and not path.is_symlink():
        return
    with suppress(CheckpointError):
        if path.is_dir() and not path.is_symlink() and has_damaged_files(path):
            shutil.rmtree(path, ignore_errors=True)
            return
    put_away(path)


def sync(path: Path) -> None:
    """See a file or the names in a folder on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
