"""Where a step's time goes: the command on a toy, the marks, and the roofline beside them."""

import json
import time
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bench.breakdown.__main__ import main, parse, predicted
from bench.breakdown.report import kernels_table, page, parts_table
from bench.breakdown.roofline import BACKWARD, FORWARD, Cost, Rates, costs, widths
from bench.breakdown.stopwatch import PARTS, Stopwatch, watched
from bench.throughput import ours
from bench.throughput.setting import Inputs, Setting
from fastjepa.models import ViTShape
from fastjepa.models.flops import Narrow, Skipped, Tokens, executed, ijepa
from fastjepa_kernels.column_sums import gelu_backward_
from fastjepa_kernels.layer_norm import add_layer_norm, add_layer_norm_backward

CPU = torch.device("cpu")
TOY = Setting("toy", batch=3, device=CPU, precision="fp32", mae_precision="fp32", pool=16)


@pytest.fixture(scope="module")
def inputs() -> Inputs:
    return Inputs(TOY)


@pytest.mark.parametrize("overrides", [[], ["--set", "speed.fused_update=false", "--mode", "packed"]])
def test_the_command_shows_all_parts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], overrides: list[str]
) -> None:
    assert main(["--device", "cpu", "--quick", "--results", str(tmp_path), *overrides]) == 0
    (path,) = (tmp_path / "cpu").glob("breakdown-toy-*.json")
    found = json.loads(path.read_text())
    parts = {part["name"]: part for part in found["parts"]}
    assert list(parts) == [name for name in PARTS if name != "average" or overrides]
    assert all(part["seconds"] > 0 for part in parts.values())
    assert all(part["predicted_s"] > 0 for name, part in parts.items() if name != "rest")
    assert found["step_s"] > 0
    assert 0 < len(found["kernels"]) <= 25
    spent = [kernel["seconds"] for kernel in found["kernels"]]
    assert spent == sorted(spent, reverse=True)
    assert sum(spent) <= found["kernel_s"] * (1 + 1e-9)
    shown = path.with_suffix(".md").read_text()
    assert shown == page(found)
    assert parts_table(found) in shown
    assert kernels_table(found) in shown
    assert shown in capsys.readouterr().out


def test_a_quick_run_writes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bench.breakdown.__main__.RESULTS", tmp_path)
    assert parse(["--device", "cpu", "--quick"]).results is None
    assert parse(["--device", "cpu"]).results == tmp_path


def test_steps_are_watched_without_a_graph_of_the_whole(capsys: pytest.CaptureFixture[str]) -> None:
    assert parse(["--device", "cpu"]).overrides == ["speed.cuda_graph=none"]
    assert parse(["--device", "cpu", "--set", "speed.cuda_graph=parts"]).overrides == [
        "speed.cuda_graph=parts"
    ]
    for kind in ("step", "auto"):
        with pytest.raises(SystemExit):
            parse(["--device", "cpu", "--set", f"speed.cuda_graph={kind}"])
        assert "its parts cannot be told apart: use" in capsys.readouterr().err


def test_the_roofline_moves_what_the_fused_passes_take_and_give() -> None:
    x, weight = torch.randn(5, 8), torch.ones(8)
    wide = torch.randn(5, 32)

    def elements(*tensors: torch.Tensor | None) -> int:
        return sum(t.numel() for t in tensors if t is not None and t.shape in (x.shape, wide.shape))

    total, normed, mean, rstd = add_layer_norm(x, x.clone(), weight, weight, 1e-6)
    dx, _, again = add_layer_norm_backward(x, x, total, weight, weight, mean, rstd, remake=True)
    grad = wide.clone()
    _, active = gelu_backward_(grad, wide, remake=True)
    moved = {
        "forward": elements(x, x, total, normed),
        "backward": elements(x, x, total, dx, again),
        "gelu": elements(grad, wide, grad, active),
    }
    assert len(FORWARD["sum and norm"].moved) * x.numel() == moved["forward"]
    assert len(BACKWARD["sum and norm"].moved) * x.numel() == moved["backward"]
    assert len(BACKWARD["GELU"].moved) * wide.numel() == moved["gelu"]
    assert (widths(FORWARD, 4.0), widths(BACKWARD, 4.0)) == (2 * 4 + 4 + 2 * 4, 2 * 5 + 8 + 4 * 4 + 3)


def test_a_watched_step_computes_what_an_unwatched_one_does(inputs: Inputs) -> None:
    config = TOY.config("masks.mode=truncate")
    losses = []
    for is_watched in (False, True):
        learner, batches = ours.learner_of(config, CPU), ours.batches_of(config, inputs)
        watch = Stopwatch(CPU)
        for batch in batches[:2]:
            if is_watched:
                with watched(learner, watch):
                    loss, _ = learner.step([batch], ours.RATES)
            else:
                loss, _ = learner.step([batch], ours.RATES)
            losses.append(float(loss))
        assert bool(watch.marks) == is_watched
    assert losses[:2] == losses[2:]
    assert "step" not in vars(learner), "nothing of the watch is left on it"


def test_marks_give_each_moment_to_the_innermost_part() -> None:
    watch = Stopwatch(CPU)
    with watch.part("outer"):
        time.sleep(0.02)
        with watch.part("inner"):
            time.sleep(0.03)
            watch.turn("turned")
            time.sleep(0.04)
        time.sleep(0.02)
    time.sleep(0.05)  # of no part
    start, end = watch.marks[0][2], watch.marks[-1][2]
    spent = watch.seconds()
    assert list(spent) == ["outer", "inner", "turned"]
    for name, least in (("outer", 0.04), ("inner", 0.03), ("turned", 0.04)):
        assert spent[name] >= least
    assert isinstance(start, float)
    assert isinstance(end, float)
    assert sum(spent.values()) == pytest.approx(end - start)
    assert watch.seconds() == {}


def test_the_roofline_s_flops_are_those_of_the_step(inputs: Inputs) -> None:
    config = TOY.config("masks.mode=packed")
    learner = ours.learner_of(config, CPU)
    roof = predicted(inputs, learner, "packed")
    steps = []
    for masks, tokens in zip(inputs.masks("packed"), inputs.tokens("packed"), strict=True):
        assert masks.asked_rows is not None
        skipped = Skipped(masks.asked_rows.numel())
        steps.append(executed(ijepa(TOY.shape(), Narrow(*TOY.predictor[:2]), tokens, skipped)))
    assert sum(cost.flop for cost in roof.values()) == pytest.approx(sum(steps) / len(steps))


TOKENS = st.builds(
    Tokens, st.lists(st.integers(1, 50), min_size=1, max_size=4), st.integers(1, 20), st.integers(1, 4)
)


@given(TOKENS, st.floats(1e9, 1e15), st.floats(1e9, 1e13), st.floats(1, 10))
def test_a_faster_device_takes_less_and_no_part_is_free(
    tokens: Tokens, flop_per_s: float, bytes_per_s: float, times: float
) -> None:
    found = costs(
        ViTShape((64, 64), 8, 32, 2, 2),
        Narrow(16, 2),
        tokens,
        None,
        element_bytes=2,
        encoder_parameters=1000,
        predictor_parameters=100,
        averages_apart=True,
    )
    assert set(found) == {name for name in PARTS if name != "rest"}
    for cost in found.values():
        slow = cost.seconds(Rates(flop_per_s, bytes_per_s))
        assert slow > 0
        assert cost.seconds(Rates(times * flop_per_s, times * bytes_per_s)) == pytest.approx(slow / times)


def test_an_average_in_the_same_pass_need_not_read_the_masters_again() -> None:
    def moved(apart: bool) -> dict[str, Cost]:
        return dict(
            costs(
                ViTShape((64, 64), 8, 32, 2, 2),
                Narrow(16, 2),
                Tokens([9], 4),
                None,
                element_bytes=2,
                encoder_parameters=1000,
                predictor_parameters=0,
                averages_apart=apart,
            )
        )

    apart, together = moved(True), moved(False)
    # Two moments and the master read and written, gradient read for norm and update, weights written; then
    # the shadow read and written, and the working copy written.
    assert apart["optimizer"].bytes_moved == 1000 * (24 + 6)
    assert together["optimizer"].bytes_moved == 1000 * (24 + 6 + 10)
    assert apart["average"].bytes_moved == 1000 * 14
    assert together["average"].bytes_moved == 0


def test_long_names_of_kernels_are_cut_and_break_no_table() -> None:
    kernel = {"name": "void at::" + "x|" * 100, "calls": 2.0, "seconds": 0.5}
    table = kernels_table({"kernels": [kernel], "kernel_s": 1.0})
    last = table.splitlines()[-1]
    assert last.count("|") == 5
    assert "50.0%" in last
    assert len(last) < 160
