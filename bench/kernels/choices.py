"""The table of a device that `fastjepa_kernels.choice` goes by, written from what was measured."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

from bench.kernels.case import DEFAULT
from bench.kernels.table import Row
from fastjepa_kernels.choice import Way, Ways, parse_table, table_name

TABLES = Path(__file__).resolve().parents[2] / "kernels" / "fastjepa_kernels" / "tables"
# Closer together than this, two implementations are as fast, and the order of the op decides.
TIE = 1.03


@dataclass(frozen=True)
class Choice:
    """An op that a call has run, at the size that its table goes by, and its implementations, best first."""

    op: str
    size: tuple[int, ...]
    offered: tuple[str, ...]


@contextmanager
def choices_made() -> Iterator[list[Choice]]:
    """What the ops called in this block chose between."""
    made: list[Choice] = []
    pick: Callable[..., Way] = Ways.pick

    def record(self: Ways, preference: str, device: Any, *args: Any) -> Way:
        offered = tuple(way.name for way in self.on(device.type) if way.takes(*args))
        choice = Choice(self.op, self.size(*args), offered)
        if choice not in made:
            made.append(choice)
        return pick(self, preference, device, *args)

    with patch.object(Ways, "pick", record):
        yield made


class Measurements:
    """The seconds of each implementation, by what it was chosen for."""

    def __init__(self) -> None:
        self.seconds: dict[Choice, dict[str, float]] = {}

    def add(self, choices: Sequence[Choice], rows: Sequence[Row], needs_graph: bool = False) -> None:
        """`rows` are those of the case and phase in which these choices were made.

        With `needs_graph`, a way that could not be captured does not count: it waits for the device, or was
        timed with the host's launches.
        """
        for choice in choices:
            total = self.seconds.setdefault(choice, {})
            for row in rows:
                if row.kind != "implementation" or (needs_graph and row.how == "launches"):
                    continue
                if row.seconds is not None:
                    name = row.way.removeprefix(f"{DEFAULT}:")
                    total[name] = total.get(name, 0.0) + row.seconds

    def fastest(self) -> dict[Choice, str]:
        found = {}
        for choice, seconds in self.seconds.items():
            timed = [name for name in choice.offered if name in seconds]
            if (
                timed and len(choice.offered) > 1
            ):  # one that is left of several, the others red, is a choice too
                best = min(seconds[name] for name in timed)
                found[choice] = next(name for name in timed if seconds[name] <= best * TIE)
        return found


def write(
    folder: Path, device_name: str, measured: Mapping[Choice, str], facts: Mapping[str, Any]
) -> Path | None:
    """Replace what the device's table says about the ops measured; None if there was nothing to choose."""
    ops: dict[str, list[dict[str, Any]]] = {}
    for choice, name in measured.items():
        ops.setdefault(choice.op, []).append({"size": list(choice.size), "fastest": name})
    if not ops:
        return None
    path = folder / table_name(device_name)
    before = json.loads(path.read_text(encoding="utf-8"))["ops"] if path.is_file() else {}
    kept = {op: sorted(rows, key=lambda row: row["size"]) for op, rows in (before | ops).items()}
    text = json.dumps({"measured": dict(facts), "ops": dict(sorted(kept.items()))}, indent=1) + "\n"
    parse_table(text)
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path
