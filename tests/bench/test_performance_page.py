"""The pages of performance are what the results give, and say what was not measured."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from bench import gpu
from bench.performance_page import (
    BEGIN,
    END,
    NOT_MEASURED,
    ROOT,
    load,
    main,
    outputs,
    page,
    readme_table,
    with_table,
)
from bench.throughput.entries import IJEPA, MAE


def row(name: str, images_per_s: float | None, **more: Any) -> dict[str, Any]:
    measured = {
        "name": name,
        "group": "main",
        "masks": "truncate",
        "images_per_s": images_per_s,
        "images_per_s_quartiles": images_per_s and [images_per_s, images_per_s],
        "over_mae": images_per_s and images_per_s / 100,
        "over_ijepa": None,
        "context_tokens": 50.0,
        "useful_flop": 84e9,
        "flop_per_s": 1e14,
        "mfu": 0.25,
        "seconds": [0.01, 0.01],
        "held_bytes": 3 << 30,
        "peak_bytes": 1 << 30,
        "kernels": 1000,
        "launches": 900,
        "host_s": 0.01,
        "how": "stayed in memory",
        "red": "" if images_per_s else "OutOfMemoryError: 9 GiB",
    }
    return measured | more


def throughput(folder: Path, date: str, size: str, rows: list[dict[str, Any]], picture: bytes = b"") -> None:
    folder.mkdir(parents=True, exist_ok=True)
    about = {
        "size": size,
        "patch_size": 16,
        "image_size": 224,
        "batch": 128,
        "precision": "bf16",
        "mae_precision": "bf16",
        "rounds": 6,
        "gemm_flop_per_s": 7e14,
        "copy_bytes_per_s": 3e12,
        "rows": rows,
    }
    content = {"device": "NVIDIA H200", "date": date, "commit": "abc", "torch": "2.11", "sizes": [about]}
    (folder / f"throughput-{date}.json").write_text(json.dumps(content))
    (folder / f"throughput-{date}.png").write_bytes(picture)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "docs").mkdir()
    (tmp_path / "README.md").write_text(f"before\n{BEGIN}\n{END}\nafter\n")
    return tmp_path


def run(root: Path, *arguments: str) -> int:
    return main(["--root", str(root), "--results", str(root / "results"), *arguments])


def test_the_pages_of_this_repository_are_what_its_results_give(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--check"]) == 0, capsys.readouterr().err


def test_check_fails_until_the_pages_are_written(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    throughput(root / "results" / "nvidia_h200", "2026-01-01T00-00-00Z", "base", [row(MAE, 100.0)], b"png")
    assert run(root, "--check") == 1
    assert "docs/performance.md is not what bench/results gives" in capsys.readouterr().err
    assert not (root / "docs" / "performance.md").exists()
    assert run(root) == 0
    assert run(root, "--check") == 0
    assert (root / "docs" / "images" / "throughput_nvidia_h200.png").read_bytes() == b"png"
    readme = (root / "README.md").read_text()
    assert readme.startswith(f"before\n{BEGIN}\n| ")
    assert readme.endswith(f"{END}\nafter\n")
    (root / "README.md").write_text(readme.replace("100", "900"))
    assert run(root, "--check") == 1, "a number changed by hand"


def test_the_newest_measurement_of_each_size_counts(root: Path) -> None:
    folder = root / "results" / "nvidia_h200"
    throughput(folder, "2026-01-01T00-00-00Z", "base", [row(MAE, 100.0), row(IJEPA, 77.0)])
    throughput(folder, "2026-01-02T00-00-00Z", "base", [row(MAE, 123.0), row(IJEPA, 66.0)])
    throughput(folder, "2026-01-03T00-00-00Z", "large", [row(MAE, 45.0)])
    throughput(folder, "2026-01-04T00-00-00Z", "base", [row(MAE, None), row(IJEPA, None)])  # all failed
    (device,) = load(root / "results")
    shown = page([device])
    assert "123" in shown
    assert " 45 " in shown
    assert " 77 " not in shown
    table = readme_table([device])
    base, large, huge = (line for line in table.splitlines() if line.startswith("| NVIDIA H200"))
    assert " 123 " in base
    assert " 66 " in base
    assert " 45 " in large
    assert NOT_MEASURED in large, "published I-JEPA was not"
    assert huge.count(NOT_MEASURED) == 10
    assert " 128 " in base
    assert "torch 2.11" in base
    assert f"ViT huge: {NOT_MEASURED}." in shown


def test_a_row_that_failed_says_why(root: Path) -> None:
    rows = [row(MAE, 100.0), row(IJEPA, None)]
    throughput(root / "results" / "nvidia_h200", "2026-01-01T00-00-00Z", "base", rows)
    assert f"{NOT_MEASURED}: OutOfMemoryError: 9 GiB" in page(load(root / "results"))


def test_what_a_file_does_not_say_is_made_of_the_sampler(root: Path) -> None:
    rows = [row(MAE, 100.0, masks="mae"), row("fastjepa I-JEPA, truncate", 200.0, context_tokens=44.8)]
    folder = root / "results" / "nvidia_h200"
    throughput(folder, "2026-01-01T00-00-00Z", "base", rows)
    path = folder / "throughput-2026-01-01T00-00-00Z.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"commit_note": "named afterwards"}))
    shown = page(load(root / "results"))
    assert "How many batches of masks these are was not recorded" in shown
    assert "truncate: context tokens of these draws: 44.8; of many: 49.95" in shown
    assert "| modernised MAE" in shown, "it was left out"
    assert "commit abc (named afterwards)" in shown
    assert "| reference MAE †" in shown, "its host takes all of the step"
    assert " 3.22 " in shown, "GB that are held"
    assert " 44.8 " in readme_table(load(root / "results"))


def test_without_any_result_everything_is_said_not_to_be_measured(root: Path) -> None:
    assert load(root / "results") == []
    assert f"On a GPU: {NOT_MEASURED}." in page([])
    assert readme_table([]).splitlines()[-1].count(NOT_MEASURED) == 10


def test_results_of_every_kind_are_shown(root: Path) -> None:
    folder = root / "results" / "cpu"
    kernels = next((ROOT / "bench" / "results" / "cpu").glob("[0-9]*.json"))
    (folder / "accuracy").mkdir(parents=True)
    shutil.copy(kernels, folder)
    (folder / "accuracy" / "accuracy.json").write_text(
        json.dumps(
            {"facts": {"device": "cpu", "date": "d"}, "verdict": {"linear_top1": ["I-JEPA was first."]}}
        )
    )
    parts = [{"name": "loss", "seconds": 0.5, "predicted_s": 0.25, "flop": 0, "bytes_moved": 1e6}]
    found = {
        "device": "cpu",
        "date": "2026-01-01T00-00-00Z",
        "size": "toy",
        "mode": "budget",
        "overrides": [],
        "batch": 4,
        "precision": "fp32",
        "step_s": 1.0,
        "host_s": 0.5,
        "busy_s": None,
        "launches": None,
        "input_copy_s": None,
        "gemm_flop_per_s": 1e10,
        "copy_bytes_per_s": 1e9,
        "parts": parts,
        "kernels": [{"name": "aten::mm", "calls": 3, "seconds": 0.5}],
        "kernel_s": 1.0,
    }
    (folder / "breakdown-toy-2026-01-01T00-00-00Z.json").write_text(json.dumps(found))
    shown = page(load(root / "results"))
    assert "I-JEPA was first." in shown
    assert "| loss |" in shown
    assert "2.00" in shown, "twice the roofline"
    assert "`aten::mm`" in shown
    assert "| `gather_tokens`" in shown


@pytest.mark.parametrize("text", ["", BEGIN, f"{END} {BEGIN}", f"{BEGIN} {END} {BEGIN} {END}"])
def test_a_readme_without_its_markers_is_refused(
    root: Path, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ValueError, match=r"README\.md must have"):
        with_table(text, "table")
    (root / "README.md").write_text(text)
    assert run(root) == 2
    assert "README.md must have" in capsys.readouterr().err


def test_only_its_own_files_are_written(root: Path) -> None:
    assert set(outputs(root / "results", root)) == {root / "docs" / "performance.md", root / "README.md"}


# Everything on a GPU


def test_what_a_part_leaves_over_goes_to_those_after_it() -> None:
    shares = [task.share for task in gpu.tasks(["base", "large", "huge"])]
    assert sum(shares) == pytest.approx(1)
    assert gpu.limits(shares, 0, 100.0) == pytest.approx(100 * shares[0])
    assert gpu.limits(shares, len(shares) - 1, 60.0) == pytest.approx(60)
    left_s = 100.0
    for done in range(len(shares)):  # all take all that they may
        limit_s = gpu.limits(shares, done, left_s)
        assert limit_s == pytest.approx(100 * shares[done])
        left_s -= limit_s
    assert left_s == pytest.approx(0)


def test_a_part_that_takes_too_long_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "_GRACE_S", 3.0)
    assert gpu.run(gpu.Task("quick", 1, ("timeit", "-n", "1", "pass")), 60.0) == 0
    assert (
        gpu.run(gpu.Task("endless", 1, ("timeit", "-n", "1", "-s", "import time", "time.sleep(60)")), 1.0)
        != 0
    )
