"""Facts about the host, and about the drive that a run goes to."""

import math
import os
import shutil
import tempfile
import time
from pathlib import Path

from fastjepa.diagnosis import patience
from fastjepa.diagnosis.facts import Drive, Host

_SHARED = Path("/dev/shm")
_CGROUP_CORES = Path("/sys/fs/cgroup/cpu.max")
_PIECE_BYTES, _PIECES = 2**20, 64  # written to find out how fast a drive is
_SPARE_BYTES = 4 * _PIECE_BYTES * _PIECES  # a drive with less than that free is given one byte alone


def look_at_host() -> Host:
    soft, hard = _file_limits()
    return Host(
        cores=_cores(),
        memory_bytes=_available_bytes(),
        shared_bytes=shutil.disk_usage(_SHARED).free if _SHARED.is_dir() else None,
        soft_files=soft,
        hard_files=hard,
    )


def look_at_drive(run: Path) -> Drive:
    """Of a run's folder, or of the nearest folder above it that is there. Leaves nothing behind."""
    try:
        return patience.within(patience.PATIENCE_S, lambda: _look_at_drive(run))
    except patience.NoAnswerError:
        most = f"{_PIECES * _PIECE_BYTES / 1e6:.0f} MB took more than {patience.PATIENCE_S:g} s"
        return Drive(run.absolute(), 0, f"no answer, or so slow a drive that {most}", None, 0)


def _look_at_drive(run: Path) -> Drive:
    folder = run.absolute()
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    saved = sum(file.stat().st_size for file in run.glob("checkpoints/step_*/*") if file.is_file())
    try:
        free = shutil.disk_usage(folder).free
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"1")
        rate = _write_rate(folder) if free > _SPARE_BYTES else None
        return Drive(folder, free, None, rate, saved)
    except OSError as error:
        return Drive(folder, 0, error.strerror or str(error), None, saved)


def _write_rate(folder: Path) -> float:
    """Bytes per second, as a checkpoint is written: in pieces, and synced at the end."""
    piece = os.urandom(_PIECE_BYTES)  # a drive that compresses shall not
    with tempfile.TemporaryFile(dir=folder) as file:
        begin_s = time.perf_counter()
        for _ in range(_PIECES):
            file.write(piece)
        file.flush()
        os.fsync(file.fileno())
        return _PIECES * _PIECE_BYTES / (time.perf_counter() - begin_s)


def _cores() -> int:
    """That this process may use: of the mask of its CPUs, and of the quota of its container."""
    mask = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = _CGROUP_CORES.read_text().split()
        return max(1, min(mask, math.ceil(int(quota) / int(period))))
    except (OSError, ValueError):  # no cgroup, or "max": no quota
        return mask


def _available_bytes() -> int | None:
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except (OSError, ValueError, IndexError):
        pass
    return None


def _file_limits() -> tuple[int | None, int | None]:
    try:
        import resource
    except ImportError:  # of Unix alone
        return None, None
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    soft, hard = (None if limit == resource.RLIM_INFINITY else limit for limit in limits)
    return soft, hard
