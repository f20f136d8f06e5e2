"""metrics.jsonl: one JSON object per logged step."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

Value = float | int | str

MOST_WAITING = 10_000  # rows, a few MB


class MetricsFile:
    """Writes rows. Those that a full disk does not take wait for the next that it does."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._rows: list[dict[str, Any]] = []  # the last one, which may be added to, and those that wait
        self._begin = 0  # where they begin in the file

    def cut_after(self, step: int) -> None:
        """Drop the rows past `step`: a run that resumes there logs them again.

        Raises:
            OSError: it cannot be read or written. What is written next does it then.
        """
        if not self.path.exists():
            return
        lines = self.path.read_bytes().splitlines(keepends=True)
        kept = [0 <= _step_of(line) <= step and line.endswith(b"\n") for line in lines]
        in_place = kept.index(False) if False in kept else len(lines)
        last = max(0, in_place - 1)
        self._begin = sum(map(len, lines[:last]))
        self._rows = [json.loads(line) for line, keep in zip(lines[last:], kept[last:], strict=True) if keep]
        if in_place < len(lines):
            self._flush()

    def has(self, step: int, key: str) -> bool:
        """Whether the last row is of `step`, and has `key`."""
        return bool(self._rows) and self._rows[-1].get("step") == step and key in self._rows[-1]

    def write(self, row: Mapping[str, Value]) -> None:
        """Append a row, or add to the last one if it is of the same step.

        Raises:
            OSError: it cannot be written, and waits.
        """
        if self._rows and self._rows[-1].get("step") == row["step"]:
            self._rows[-1] |= row
        else:
            self._rows.append(dict(row))
        del self._rows[:-MOST_WAITING]
        self._flush()

    def _flush(self) -> None:
        """Write the rows where they begin; what there is of an earlier try is written over."""
        lines = [json.dumps(row).encode() + b"\n" for row in self._rows]
        # Not by a file renamed into place: a full disk has no room for a second one.
        descriptor = os.open(self.path, os.O_WRONLY | os.O_CREAT, 0o666)
        with open(descriptor, "wb") as stream:
            stream.seek(self._begin)
            stream.write(b"".join(lines))
            stream.truncate()
        self._begin += sum(map(len, lines[:-1]))
        del self._rows[:-1]


def read_rows(path: Path) -> list[dict[str, Any]]:
    """All rows of a file, but for a torn one at its end.

    Raises:
        OSError: it cannot be read.
    """
    return [json.loads(line) for line in path.read_bytes().splitlines() if _step_of(line) >= 0]


def _step_of(line: bytes) -> int:
    """-1 where there is none: the last line of a killed run may be torn."""
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return -1
