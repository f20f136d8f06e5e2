"""The table of what each compiled kernel takes: committed as one line a row, printed as columns."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import triton

from bench.aot.resources import Resources

Key = tuple[str, str, str]  # kernel, target, launch


@dataclass(frozen=True)
class Row:
    kernel: str
    target: str
    launch: str
    case: str  # the first that makes this launch
    resources: Resources

    @property
    def key(self) -> Key:
        return self.kernel, self.target, self.launch

    def line(self) -> str:
        return json.dumps(
            {"kernel": self.kernel, "target": self.target, "case": self.case, "launch": self.launch}
            | asdict(self.resources)
        )


def path(version: str = triton.__version__) -> Path:
    """The table of a version of Triton, whether there is one or not."""
    return Path(__file__).with_name(f"triton-{version.partition('+')[0]}.json")


def read(file: Path) -> dict[Key, Row] | None:
    """None: nobody has written a table for this Triton."""
    if not file.exists():
        return None
    rows = []
    for each in json.loads(file.read_text(encoding="utf-8")):
        kernel, target, case, launch = (each.pop(name) for name in ("kernel", "target", "case", "launch"))
        rows.append(Row(kernel, target, launch, case, Resources(**each)))
    return {row.key: row for row in rows}


def lines(rows: Iterable[Row]) -> list[str]:
    return [row.line() for row in sorted(rows, key=lambda row: row.key)]


def write(file: Path, rows: Iterable[Row]) -> None:
    file.write_text("[\n" + ",\n".join(lines(rows)) + "\n]\n", encoding="utf-8")


COLUMNS: Mapping[str, str] = {
    "registers": "reg",
    "scalar_registers": "sgpr",
    "shared": "shared",
    "tensor_memory": "tmem",
    "stack": "stack",
    "local": "local",
    "spills": "spill",
    "scalar_spills": "sspill",
    "vector_loads": "vload",
    "loads": "load",
    "vector_stores": "vstore",
    "stores": "store",
}


def heading() -> str:
    numbers = " ".join(f"{name:>6}" for name in COLUMNS.values())
    return f"{'kernel':40} {'target':6} {numbers}  matrix, case"


def columns(row: Row) -> str:
    """A row for a terminal, below `heading`."""
    numbers = " ".join(f"{getattr(row.resources, name):6}" for name in COLUMNS)
    said = [f"{count} {name}" for name, count in row.resources.matrix.items()]
    return f"{row.kernel:40} {row.target:6} {numbers}  {', '.join([*said, row.case])}"
