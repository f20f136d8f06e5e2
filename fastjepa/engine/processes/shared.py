"""Whether all hosts of a run see one and the same run folder."""

import os
import secrets
import socket
import time
from contextlib import suppress
from pathlib import Path

from fastjepa.config import ConfigError
from fastjepa.engine.processes.world import World

# NFS may keep for a minute that a folder is not there.
_CACHED_S = 70.0
_LOOK_S = 0.1


def check_shared(world: World, folder: Path, within_s: float = _CACHED_S) -> None:
    """Look from every rank for what rank 0 writes: a resuming rank reads its checkpoint there.

    Raises:
        ConfigError: on every rank, if one does not see it; the message names it.
    """
    if world.size == 1:
        return
    mark = folder / ".shared"
    token = secrets.token_hex(16)
    world.on_main(lambda: mark.write_text(token))
    token = world.gather(token)[0]
    deadline_s = time.monotonic() + within_s
    while not (is_seen := _reads(mark, token)) and time.monotonic() < deadline_s:
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


def _reads(mark: Path, token: str) -> bool:
    with suppress(OSError):
        os.listdir(mark.parent)  # has NFS look again
        return mark.read_text() == token
    return False
