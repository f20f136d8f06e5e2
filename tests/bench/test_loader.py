"""The benchmark of the loader, at the size of a test: what it measures with, and that it writes all."""

import json
from pathlib import Path

import pytest
from PIL import Image

from bench.loader.__main__ import BASELINE, main
from bench.loader.photographs import HEIGHT, WIDTH, photograph, write_photographs

pytest.importorskip("webdataset")
pytest.importorskip("torchvision")


def test_photographs_are_as_large_as_photographs(tmp_path: Path) -> None:
    assert 60_000 < write_photographs(tmp_path, 4) < 110_000
    with Image.open(next(tmp_path.rglob("*.jpg"))) as image:
        assert image.size == (WIDTH, HEIGHT)
    assert photograph(0).tobytes() == photograph(0).tobytes()
    assert photograph(0).tobytes() != photograph(1).tobytes()


def test_all_are_measured_and_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small = [
        "--photographs",
        "8",
        "--rounds",
        "1",
        "--memory-images",
        "640",
        "--workers",
        "1",
        "--rate",
        "1e6",
    ]
    assert main([*small, "--folder", str(tmp_path), "--results", str(tmp_path / "results")]) == 0
    (path,) = (tmp_path / "results" / "cpu").glob("loader-*.json")
    assert capsys.readouterr().out.endswith(f"{path}\n")
    written = json.loads(path.read_text())
    speeds = written["images_per_second_of_one_core"]
    assert speeds[BASELINE]["ratio"] == 1
    assert len(speeds) == 4 + 3 * 2 * 2
    assert all(of["per_second"] > 0 and of["per_cpu_second"] > 0 for of in speeds.values())
    assert written["resume"]["images"] == 1_200_000
    assert written["memory"]["at_the_end_mib"] > 0
    assert 0 < written["wait"]["fraction"] <= 1
    assert written["pack"]["ratio"] > 0
    assert [path.name for path in tmp_path.iterdir()] == ["results"]
