"""The commands that measure, on shapes as small as they take."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from shutil import which
from typing import Any

import pytest
import torch

from bench.kernels import bench_gather, bench_patchify, gpu
from bench.kernels.case import DEFAULT, Case, Random, Way
from bench.kernels.clock import WallClock
from bench.kernels.session import Session

ROOT = Path(__file__).resolve().parents[2]


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    """As a user does: without the interpreter that tests run Triton by."""
    # Under the variables of one test process of several, pytest-benchmark takes itself for another of those.
    env = {key: value for key, value in os.environ.items() if not key.startswith(("PYTEST_", "TRITON_"))}
    command = [sys.executable, "-m", *arguments]
    return subprocess.run(
        command, cwd=ROOT, env=env | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True
    )


@pytest.mark.slow
def test_the_gpu_s_command_runs_as_a_whole_on_a_cpu(tmp_path: Path) -> None:
    folders = ["--results", str(tmp_path / "results"), "--tables", str(tmp_path / "tables")]
    done = run("bench.kernels.gpu", "--device", "cpu", "--quick", *folders)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "RED" not in done.stdout
    (path,) = (tmp_path / "results" / "cpu").glob("*.json")
    rows = json.loads(path.read_text())["rows"]
    assert {row["op"] for row in rows if row["way"] == DEFAULT} == {
        "gather_tokens",
        "patchify_gather",
        "packed_attention",
        "jepa_loss",
        "ema_update_",
        "adamw_ema_",
    }
    assert all(row["seconds"] > 0 for row in rows)
    assert not any("triton" in row["way"] for row in rows), "the interpreter is not for measuring"
    assert done.stdout.count("\n| `packed_attention`") == 6
    assert (tmp_path / "tables" / "cpu.json").exists(), "attention has ways to choose between on any machine"


def test_without_a_gpu_it_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    assert gpu.main([]) == 2
    assert "no CUDA device" in capsys.readouterr().err


@pytest.mark.slow
def test_the_benchmarks_print_and_keep_a_comparison(tmp_path: Path) -> None:
    arguments = ["--benchmark-only", "-k", "patchify and 50", "--results", str(tmp_path), "-q"]
    done = run("pytest", "bench/kernels", *arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "### `patchify_gather` forward" in done.stdout
    assert "1 passed" in done.stdout
    (path,) = (tmp_path / "cpu").glob("*.json")
    ways = {row["way"] for row in json.loads(path.read_text())["rows"]}
    assert {DEFAULT, f"{DEFAULT}:torch", "published", "bytes first", "copy"} <= ways


def session() -> Session:
    return Session(WallClock(1), seconds_each=0, copied_bytes=64)


def spoiled(case: Case, name: str) -> Case:
    """One of ours off by a thousandth."""

    def ways(device_type: str) -> list[Way]:
        return [
            replace(way, call=lambda *inputs, way=way: way.call(*inputs) * 1.001) if way.name == name else way
            for way in case.ways(device_type)
            if "triton" not in way.name
        ]

    return replace(case, ways=ways)


def test_a_red_op_has_no_number_and_does_not_end_the_rest(capsys: pytest.CaptureFixture[str]) -> None:
    one = session()
    patchify, gather = (
        bench_patchify.cases("small", torch.float32)[0],
        bench_gather.cases("small", torch.float32)[0],
    )
    gpu.check_all(one, [spoiled(patchify, DEFAULT)], budget_s=60)
    red = one.distrusted["patchify_gather"]
    assert list(red) == [DEFAULT]
    assert "result 0 has error" in red[DEFAULT]
    assert not one.is_right
    gpu.race_all(one, [patchify, uninterpreted(gather)], budget_s=60)
    assert {row.seconds for row in one.rows if row.op == "patchify_gather"} == {None}
    assert all(row.red == red[DEFAULT] for row in one.rows if row.op == "patchify_gather")
    assert all(row.seconds for row in one.rows if row.op == "gather_tokens")
    assert "RED patchify_gather" in capsys.readouterr().out


def test_a_red_implementation_is_not_timed_and_does_not_end_its_op() -> None:
    one = session()
    patchify = bench_patchify.cases("small", torch.float32)[0]
    gpu.check_all(one, [spoiled(patchify, f"{DEFAULT}:torch")], budget_s=60)
    assert list(one.distrusted["patchify_gather"]) == [f"{DEFAULT}:torch"]
    gpu.race_all(one, [uninterpreted(patchify)], budget_s=60)
    rows = {row.way: row for row in one.rows if row.phase == "forward"}
    assert rows[DEFAULT].seconds
    assert rows[f"{DEFAULT}:torch"].seconds is None
    assert "result 0 has error" in rows[f"{DEFAULT}:torch"].red


def uninterpreted(case: Case) -> Case:
    return replace(case, ways=lambda device: [way for way in case.ways(device) if "triton" not in way.name])


def test_an_op_that_raises_does_not_end_the_rest() -> None:
    def fail(_random: Random) -> tuple[Any, ...]:
        raise RuntimeError("out of everything")

    one = session()
    gather = bench_gather.cases("small", torch.float32)[0]
    broken = replace(gather, op="broken", make=fail)
    gpu.check_all(one, [broken], budget_s=60)
    assert one.distrusted == {"broken": {DEFAULT: f"{broken}: RuntimeError: out of everything"}}
    one.distrusted.clear()
    gpu.race_all(one, [broken, uninterpreted(gather)], budget_s=60)
    assert {row.op for row in one.rows} == {"gather_tokens"}
    assert [line for line in one.left_out if "out of everything" in line]


def test_what_there_is_no_time_for_is_named() -> None:
    one = session()
    cases = bench_gather.cases("small", torch.float32)
    gpu.check_all(one, cases, budget_s=-1)
    assert one.distrusted == {"gather_tokens": {}}
    assert len(one.left_out) == len(cases)
    gpu.race_all(one, cases, budget_s=-1)
    assert one.rows == []
    assert len(one.left_out) == len(cases) * 4


def test_time_is_shared_out_among_the_cases(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(gpu.time, "monotonic", lambda: now[0])
    pace = gpu.Pace(budget_s=100, cases=10)
    now[0] = 15
    assert not pace.allows(done=0)
    assert pace.allows(done=1)
    assert not pace.is_over
    now[0] = 101
    assert pace.is_over


@pytest.mark.skipif(which("make") is None, reason="needs make")
def test_sanitizing_without_the_tool_says_what_is_missing() -> None:
    command = ["make", "sanitize", "SANITIZER=nothing-like-it"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode != 0
    assert "needs compute-sanitizer" in done.stderr


def test_what_was_measured_is_kept_when_the_rest_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(session: Session, *_arguments: Any) -> None:
        session.left_out.append("the rest")
        raise RuntimeError("the device is gone")

    monkeypatch.setattr(gpu, "measure", fail)
    with pytest.raises(RuntimeError, match="the device is gone"):
        gpu.main(["--device", "cpu", "--quick", "--results", str(tmp_path)])
    (kept,) = tmp_path.glob("cpu/*.json")
    assert json.loads(kept.read_text())["left_out"] == ["the rest"]
