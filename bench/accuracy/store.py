"""What has been measured, on disk: one file for each task, written as soon as it is done."""

import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from bench.accuracy.plan import Condition, Task


@dataclass(frozen=True)
class Point:
    """One judgement."""

    step: int
    seconds: float  # of training: steps by the seconds of a step with the device to itself
    flop: float  # of training
    knn_top1: float | None  # fractions; None if the run has diverged
    linear_top1: float | None


@dataclass(frozen=True)
class Result:
    """A task and its judgements, in order. For pixels and the untrained encoder there is one, at step 0."""

    learner: str
    seed: int
    kind: str
    strength: float
    points: list[Point]
    about: dict[str, Any] = field(default_factory=dict)  # of its training: loss, device, …

    @property
    def condition(self) -> Condition:
        return Condition(self.kind, self.strength)

    @property
    def task(self) -> Task:
        return Task(self.learner, self.condition, self.seed)


class OtherSettings(Exception):
    """The folder holds results of other settings."""


@dataclass(frozen=True)
class Store:
    """A folder with `settings.json` and `runs/<task>.json`."""

    folder: Path

    def open(self, asked: dict[str, Any]) -> dict[str, Any] | None:
        """What was measured of the device for these settings; None in a new folder.

        Raises:
            OtherSettings: results made with others must not be mixed with these.
        """
        path = self.folder / "settings.json"
        if not path.exists():
            return None
        known = json.loads(path.read_text(encoding="utf-8"))
        asked = json.loads(json.dumps(asked))
        changed = sorted(key for key in asked if asked[key] != known["asked"].get(key))
        if changed:
            raise OtherSettings(
                f"{self.folder} holds runs of other settings ({', '.join(changed)}): remove it, or give "
                "another folder with --results"
            )
        measured: dict[str, Any] = known["measured"]
        return measured

    def begin(self, asked: dict[str, Any], measured: dict[str, Any], facts: dict[str, Any]) -> None:
        self._write("settings.json", {"asked": asked, "measured": measured, "facts": facts})

    def settings(self) -> dict[str, Any]:
        path = self.folder / "settings.json"
        settings: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        return settings

    def has(self, task: Task) -> bool:
        return (self.folder / "runs" / f"{task}.json").exists()

    def save(self, result: Result) -> None:
        self._write(f"runs/{result.task}.json", asdict(result))

    def results(self) -> list[Result]:
        """All there are, ordered by name."""
        found = []
        for path in sorted((self.folder / "runs").glob("*.json")):
            content = json.loads(path.read_text(encoding="utf-8"))
            points = [Point(**point) for point in content.pop("points")]
            found.append(Result(**content, points=points))
        return found

    def _write(self, name: str, content: dict[str, Any]) -> None:
        """Whole or not at all, whatever ends the process."""
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        half = path.with_suffix(".half")
        half.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        os.replace(half, path)
