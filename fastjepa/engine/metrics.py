"""metrics.jsonl: one JSON object per logged step."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

Value = float | int | str


class MetricsFile:
    """Writes rows. A full disk is reported once and does not stop the run."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.failure: str | None = None
        self._last: dict[str, Any] = {}  # the last row, which more of the same step is added to
        self._begin = 0  # where it begins in the file, and
        self._end = 0  # ends

    def cut_after(self, step: int) -> None:
        """Drop the rows past `step`: a resumed run logs them again."""
        if not self.path.exists():
            return
        kept = [line for line in self.path.read_bytes().splitlines() if 0 <= _step_of(line) <= step]
        partial = self.path.with_suffix(".tmp")
        partial.write_bytes(b"".join(line + b"\n" for line in kept))
        os.replace(partial, self.path)
        self._end = sum(len(line) + 1 for line in kept)
        self._begin = self._end - len(kept[-1]) - 1 if kept else 0
        self._last = json.loads(kept[-1]) if kept else {}

    def has(self, step: int, key: str) -> bool:
        """Whether the last row is of `step`, and has `key`."""
        return self._last.get("step") == step and key in self._last

    def write(self, row: Mapping[str, Value]) -> str | None:
        """Append a row, or add to the last one if it is of the same step.

        Returns:
            A message, the first time that it cannot be written.
        """
        same_step = self._last.get("step") == row["step"]
        begin = self._begin if same_step else self._end
        last = {**self._last, **row} if same_step else dict(row)
        line = json.dumps(last).encode() + b"\n"
        try:
            descriptor = os.open(self.path, os.O_WRONLY | os.O_CREAT, 0o666)
            with open(descriptor, "wb") as stream:
                stream.seek(begin)
                stream.write(line)
                stream.truncate()
        except OSError as error:
            self._last, self._end = {}, begin  # the next row goes over what there is of this one
            if self.failure is None:
                self.failure = f"cannot write {self.path}: {error.strerror}; training goes on without it"
                return self.failure
            return None
        self._last, self._begin, self._end = last, begin, begin + len(line)
        return None


def _step_of(line: bytes) -> int:
    """-1 where there is none: the last line of a killed run may be torn."""
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return -1
