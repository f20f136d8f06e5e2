"""metrics.jsonl: one JSON object per logged step."""

import json
import os
from collections.abc import Mapping
from pathlib import Path

Value = float | int | str


class MetricsFile:
    """Appends rows. A full disk is reported once and does not stop the run."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.failure: str | None = None

    def cut_after(self, step: int) -> None:
        """Drop the rows past `step`: a resumed run logs them again."""
        if not self.path.exists():
            return
        kept = [
            line for line in self.path.read_text().splitlines() if _step_of(line, default=step + 1) <= step
        ]
        partial = self.path.with_suffix(".tmp")
        partial.write_text("".join(f"{line}\n" for line in kept))
        os.replace(partial, self.path)

    def append(self, row: Mapping[str, Value]) -> str | None:
        """Write a row; a message the first time that it cannot be written."""
        try:
            with self.path.open("a") as stream:
                stream.write(json.dumps(row) + "\n")
        except OSError as error:
            if self.failure is None:
                self.failure = f"cannot write {self.path}: {error.strerror}; training goes on without it"
                return self.failure
        return None


def _step_of(line: str, default: int) -> int:
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):  # the last line of a killed run may be torn
        return default
