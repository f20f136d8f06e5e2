"""What was measured on one GPU: steps of whole training, from the files of `bench.throughput`."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

ROW = "fastjepa I-JEPA, truncate"
REFERENCE = "published I-JEPA"  # whose kernels the host launches one by one
ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "bench" / "results" / "nvidia_h100_80gb_hbm3"


@dataclass(frozen=True)
class Measured:
    """A row of a file.

    Attributes:
        file: it is in, from the repository's root.
        device: of it.
        size: a key of SIZES.
        row: of the table.
        batch: images of a step.
        step_s: the median over rounds.
        useful_flop: of an image, backward as twice forward.
        flop_per_s: useful; mfu: its share of the matrix product timed in the same rounds.
        copy_bytes_per_s: of a large copy, bytes read and written together.
        kernels: of a step.
        launch_s: of the host for each kernel of the reference in the same file, launched one by one.
        memory_bytes: of the device.
        peak_bytes: of the row.
        context_tokens: of an image.
    """

    file: str
    device: str
    size: str
    row: str
    batch: int
    step_s: float
    useful_flop: float
    flop_per_s: float
    mfu: float
    copy_bytes_per_s: float
    kernels: int
    launch_s: float
    memory_bytes: int
    peak_bytes: int
    context_tokens: float


def load(results: Path = RESULTS, row: str = ROW) -> dict[str, Measured]:
    """Of each size the newest row that has a time.

    Raises:
        FileNotFoundError: nothing was measured, and there is nothing to stand on.
    """
    found: dict[str, Measured] = {}
    for path in sorted(results.glob("throughput-*.json")):  # their names end in a date
        file = json.loads(path.read_text(encoding="utf-8"))
        for size in file["sizes"]:
            rows = {each["name"]: each for each in size["rows"] if each["images_per_s"]}
            if row in rows and REFERENCE in rows:
                found[size["size"]] = _measured(path, file, size, rows[row], rows[REFERENCE])
    if not found:
        raise FileNotFoundError(f"no throughput-*.json under {results} has a row {row!r}")
    return found


def _measured(
    path: Path,
    file: Mapping[str, Any],
    size: Mapping[str, Any],
    row: Mapping[str, Any],
    other: Mapping[str, Any],
) -> Measured:
    inside = path.resolve().is_relative_to(ROOT)
    return Measured(
        file=str(path.resolve().relative_to(ROOT)) if inside else str(path),
        device=file["device"],
        size=size["size"],
        row=row["name"],
        batch=row["batch"],
        step_s=median(row["seconds"]),
        useful_flop=row["useful_flop"],
        flop_per_s=row["flop_per_s"],
        mfu=row["mfu"],
        copy_bytes_per_s=size["copy_bytes_per_s"],
        kernels=row["kernels"],
        launch_s=other["host_s"] / other["launches"],
        memory_bytes=file["memory_bytes"],
        peak_bytes=row["peak_bytes"],
        context_tokens=row["context_tokens"],
    )
