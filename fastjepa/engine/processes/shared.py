"""Whether all hosts of a run see one and the same run folder."""

import os
import secrets
import socket
import time
from contextlib import suppress
from pathlib import Path

from fastjepa.config import ConfigError
from fastjepa.engine.disk import remedy
from fastjepa.engine.processes.world import World

# NFS may keep for a minute that a folder is not there.
_CACHED_S = 70.0
_LOOK_S = 0.1


def check_shared(world: World, folder: Path, within_s: float = _CACHED_S) -> None:
    """Look from every rank for a file that rank 0 makes: a resuming rank reads its checkpoint there.

    Raises:
        ConfigError: on every rank, if one does not see it; the message names it. On rank 0, if it cannot be
            made.
    """
    if world.size == 1:
        return
    mark = folder / f".shared.{secrets.token_hex(16)}"
    world.on_main(lambda: _make(mark))
    mark = folder / world.gather(mark.name)[0]
    deadline_s = time.monotonic() + within_s
    while not (is_seen := _sees(mark)) and time.monotonic() < deadline_s:
        time.sleep(_LOOK_S)
    where = None if is_seen else f"rank {world.rank} on {socket.gethostname()} at {folder.resolve()}"
    blind = [place for place in world.gather(where) if place is not None]
    if world.is_main:
        with suppress(OSError):
            mark.unlink()
    if blind:
        more = f" and {len(blind) - 1} more" if len(blind) > 1 else ""
        raise ConfigError(
            f"the run folder of rank 0 is not seen by {blind[0]}{more}, looked for {within_s:g} s: run.dir "
            "must be on a drive that all hosts share, and its whole path given"
        )


def _make(mark: Path) -> None:
    """An empty file, for which a full disk mostly has room: a run that is queued again may start there.

    Where there is none even for that the run is refused: nobody could tell whether hosts share the folder.
    """
    try:
        for stale in mark.parent.glob(".shared.*"):  # of a run that was killed meanwhile
            stale.unlink()
        mark.touch()
    except OSError as error:
        raise ConfigError(f"cannot write {mark}: {error.strerror}; {remedy(error)}") from error


def _sees(mark: Path) -> bool:
    with suppress(OSError):
        return mark.name in os.listdir(mark.parent)  # has NFS look again
    return False
