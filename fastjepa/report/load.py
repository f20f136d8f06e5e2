"""A run folder as dataclasses. A run may still be going, or have ended early: what is missing or
unreadable is said in `Run.notes`, in words for the page, and never stops the report."""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from safetensors import SafetensorError, safe_open
from torch import Tensor

from fastjepa.evaluation.showing import Showing, showing_of

T = TypeVar("T")

Metrics = list[dict[str, float]]  # a row per logged step, ascending; a key is there where it was logged


@dataclass(frozen=True)
class Probe:
    """One row of the probe table; accuracies are fractions, None where not measured."""

    name: str
    knn_top1: float | None = None
    linear_top1: float | None = None
    rankme: float | None = None
    target_std: float | None = None


@dataclass(frozen=True)
class Summary:
    """What the trainer says about the whole run."""

    name: str
    objective: str = ""
    steps: int | None = None
    images: int | None = None
    planned_steps: int | None = None
    train_s: float | None = None
    spent_s: dict[str, float] = field(default_factory=dict)  # outside of what the rows of metrics cover
    precision: str = ""
    device: str = ""
    versions: dict[str, str] = field(default_factory=dict)
    probes: tuple[Probe, ...] = ()
    along: tuple[Probe, ...] = ()  # the baselines, judged as along the way; empty in older versions
    judged_images: int | None = None  # that the accuracies are of
    probe_note: str = ""

    def probe(self, name: str) -> Probe | None:
        """The row of that name, if it was measured."""
        return next((probe for probe in self.probes if probe.name == name), None)

    def baseline_along(self, name: str) -> Probe | None:
        """The same, judged as along the way."""
        return next((probe for probe in self.along if probe.name == name), None)


@dataclass(frozen=True)
class Snapshot:
    """Features and masks of a few fixed images at one step."""

    step: int
    grid: tuple[int, int]
    images: Tensor  # uint8 [n, C, H, W]
    features: Tensor  # fp16 [n, N, D]
    context: list[Tensor]  # n of int64 [K_i]
    targets: Tensor | None  # int64 [M, n, P]; None: everything outside the context is predicted
    showing: Showing = field(default_factory=Showing)  # nothing, where an older version wrote it
    class_names: tuple[str, ...] = ()


@dataclass(frozen=True)
class Run:
    """All that the page is made of."""

    config: str  # YAML text, "" when missing
    metrics: Metrics
    summary: Summary
    snapshots: list[Snapshot]  # by step
    notes: list[str]


def load_run(run_dir: Path) -> Run:
    """Read `config.yaml`, `metrics.jsonl`, `report/summary.json` and `report/snapshots/` of a run.

    Raises:
        FileNotFoundError: `run_dir` is not a folder.
    """
    if not run_dir.is_dir():
        raise FileNotFoundError(f"{run_dir} is not a folder; give the folder a run wrote (its `run.dir`)")
    notes: list[str] = []

    def attempt(read: Callable[[Path], T], path: Path, otherwise: T, without: str) -> T:
        try:
            return read(path)
        except FileNotFoundError:
            notes.append(f"There is no {path.relative_to(run_dir)}: {without}.")
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
            reason = f"{type(error).__name__}: {error}"
            notes.append(f"{path.relative_to(run_dir)} cannot be read ({reason}): {without}.")
        return otherwise

    config = attempt(Path.read_text, run_dir / "config.yaml", "", "the configuration is not shown")
    nothing: tuple[Metrics, int] = ([], 0)
    metrics, bad_lines = attempt(
        _read_metrics, run_dir / "metrics.jsonl", nothing, "no curves, and collapse is not checked"
    )
    if bad_lines:
        notes.append(f"Lines of metrics.jsonl left out, as they are no JSON object with a step: {bad_lines}.")
    summary = attempt(
        _read_summary,
        run_dir / "report" / "summary.json",
        Summary(name=run_dir.name),
        "the run has not ended, or ended early, and the trained encoder has not been probed",
    )
    paths = sorted((run_dir / "report" / "snapshots").glob("*.safetensors"))
    read = [
        attempt(_read_snapshot, path, None, "this snapshot is left out")
        for path in paths
        if path.exists()  # a run that is going thins them
    ]
    snapshots = sorted((snapshot for snapshot in read if snapshot is not None), key=lambda s: s.step)
    if not snapshots:
        notes.append("There are no snapshots in report/snapshots: no pictures of masks and features.")
    return Run(config, metrics, summary, snapshots, notes)


def _read_metrics(path: Path) -> tuple[Metrics, int]:
    """The rows, and how many lines were unreadable, not counting a last one cut off in the middle."""
    text = path.read_text(errors="replace")
    lines = text.splitlines()
    by_step: dict[int, dict[str, float]] = {}  # a resumed run logs a few steps again: the last one counts
    bad_lines = 0
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
            step = int(row["step"] + 0)  # a number, and not the text of one
        except (ValueError, TypeError, KeyError, OverflowError):
            torn = number == len(lines) and not text.endswith("\n")
            bad_lines += not torn
        else:
            by_step[step] = {key: v for key, v in row.items() if isinstance(v, int | float)}
    return [by_step[step] for step in sorted(by_step)], bad_lines


def _read_summary(path: Path) -> Summary:
    raw = json.loads(path.read_text())
    if not isinstance(raw, dict):
        raise ValueError("it is no JSON object")
    return Summary(
        name=raw["name"],
        objective=raw.get("objective", ""),
        steps=raw.get("steps"),
        images=raw.get("images"),
        planned_steps=raw.get("planned_steps"),
        train_s=raw.get("train_s"),
        spent_s=raw.get("spent_s") or {},
        precision=raw.get("precision", ""),
        device=raw.get("device", ""),
        versions=raw.get("versions") or {},
        probes=_probes(raw.get("probe")),
        judged_images=_judged_images(raw.get("judge")),
        along=_probes(raw.get("probe_along")),
        probe_note=raw.get("probe_note") or "",
    )


def _judged_images(judge: dict[str, Any] | None) -> int | None:
    if not judge or "final_queries" not in judge:
        return None
    return int(min(judge["final_queries"], judge.get("images") or judge["final_queries"]))


def _probes(rows: list[dict[str, Any]] | None) -> tuple[Probe, ...]:
    """Without what is no number: NaN is read by Python, whatever wrote it."""
    known = [key for key in Probe.__dataclass_fields__ if key != "name"]
    return tuple(
        Probe(
            row["name"], **{key: row[key] for key in known if math.isfinite(row.get(key) or 0) and key in row}
        )
        for row in rows or []
    )


def _read_snapshot(path: Path) -> Snapshot:
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata() or {}
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a dict
    down, across = (int(side) for side in metadata["grid"].split(","))
    if "context" in tensors:
        context = list(tensors["context"])
    else:
        context = list(tensors["context_flat"].split(tensors["cu_seqlens"].diff().tolist()))
    return Snapshot(
        step=int(metadata["step"]),
        grid=(down, across),
        images=tensors["images"],
        features=tensors["features"],
        context=context,
        targets=tensors.get("targets"),
        showing=showing_of(tensors),
        class_names=tuple(json.loads(metadata.get("class_names", "[]"))),
    )
