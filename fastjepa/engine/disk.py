"""A full disk, or one that has become read-only, costs what could not be written, and not the run."""

import errno
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from fastjepa.engine.console import RunConsole


@dataclass
class Disk:
    """Warns of each file that cannot be written: once, and once more when it can be again."""

    console: RunConsole
    _failures: dict[Path, int] = field(default_factory=dict)

    def attempt(self, path: Path, write: Callable[[], object], otherwise: str) -> bool:
        """Write; False if that failed.

        Args:
            path: of what is written, for people.
            write: what may raise OSError.
            otherwise: what it costs, for people.
        """
        try:
            write()
        except OSError as error:
            self.failed(path, error, otherwise)
            return False
        self.works(path)
        return True

    def failed(self, path: Path, error: BaseException, otherwise: str) -> None:
        """Warn, the first time; then count."""
        if self.is_news(path):
            reason = (error.strerror if isinstance(error, OSError) else None) or str(error)
            self.console.warn(f"cannot write {path}: {reason}; {otherwise}")

    def is_news(self, path: Path) -> bool:
        """Count that it cannot be written; whether it could before."""
        self._failures[path] = self._failures.get(path, 0) + 1
        return self._failures[path] == 1

    def works(self, path: Path) -> None:
        """Say so, if it did not before."""
        count = self._failures.pop(path, 0)
        if count:
            times = "once" if count == 1 else f"{count} times"
            self.console.say(f"{path} can be written again; {times} it could not")


def remedy(error: OSError) -> str:
    """What the person at the keyboard can do about what cannot be written in a run folder."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return "free space there, and start it again"
    return "choose another run.dir, or let this user write there"
