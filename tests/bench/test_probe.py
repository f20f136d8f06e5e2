"""The benchmark of the linear sweep, on its smallest case."""

import json
from pathlib import Path

import pytest

from bench import probe
from fastjepa.evaluation.sweep import HEADS


def test_it_writes_what_it_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(probe, "CASES", (probe.Case("small", 600, 32, 10, "fashion_mnist", 32),))
    assert probe.main(["--rounds", "3", "--epochs", "1", "--device", "cpu", "--results", str(tmp_path)]) == 0
    (path,) = (tmp_path / "cpu").glob("probe-*.json")
    assert str(path) in capsys.readouterr().out
    (row,) = json.loads(path.read_text())["rows"]
    assert row["heads"] == len(HEADS)
    assert len(row["rounds"]) == 3
    ratios = sorted(r["sweep_s"] / r["one_s"] for r in row["rounds"])
    assert row["training_alone"] == ratios[1]
    # With what both have in common, the ratio is nearer to 1.
    assert abs(row["with_features"] - 1) < abs(row["training_alone"] - 1)
    # LARS has operators of its own; nothing is launched once for each head.
    assert row["launches_sweep"] < 2 * row["launches_one"]
