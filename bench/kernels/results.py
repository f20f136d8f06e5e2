"""Where a comparison is kept: what was measured, where and with what, as JSON and as a page."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bench.kernels.table import Row, markdown, summary
from fastjepa_kernels.choice import table_name

RESULTS = Path(__file__).resolve().parents[1] / "results"


def page(facts: Mapping[str, Any], rows: Sequence[Row], left_out: Sequence[str]) -> str:
    lines = [f"# {facts['device']}", ""]
    lines += [f"- {name}: {value}" for name, value in facts.items() if name != "device"]
    if left_out:
        lines += ["", "Not measured:", ""] + [f"- {line}" for line in left_out]
    return "\n".join([*lines, "", summary(rows), "", markdown(rows)])


def save(folder: Path, facts: Mapping[str, Any], rows: Sequence[Row], left_out: Sequence[str]) -> Path:
    """Write <folder>/<device>/<date>.json and .md; the JSON's path."""
    path = folder / table_name(facts["device"]).removesuffix(".json") / f"{facts['date']}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {**facts, "left_out": list(left_out), "rows": [asdict(row) for row in rows]}
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    path.with_suffix(".md").write_text(page(facts, rows, left_out), encoding="utf-8")
    return path
