"""Whole steps side by side: the command on toy shapes, and what is made of its times."""

import json
import math
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bench.throughput import ours
from bench.throughput.__main__ import main, parse
from bench.throughput.entries import IJEPA, MAE, Entry, Step, chosen, entries
from bench.throughput.gauges import covered, gauge_for, trace
from bench.throughput.race import Race, at_most
from bench.throughput.report import (
    COLUMNS,
    cells,
    complete,
    markdown,
    masks_note,
    most_bytes,
    quartiles,
    ratio,
    rows_of,
    size_of,
    waits_for_host,
)
from bench.throughput.setting import Inputs, Setting, population, representative, tokens_of
from fastjepa.objectives import JEPA

CPU = torch.device("cpu")
TOY = Setting("toy", batch=3, device=CPU, precision="fp32", mae_precision="fp32", pool=16)


@pytest.fixture(scope="module")
def inputs() -> Inputs:
    return Inputs(TOY)


def race_of(inputs: Inputs, seconds: float = 60.0) -> Race:
    return Race(
        inputs, gauge_for(CPU, quick=True), 3, 2, deadline_s=time.monotonic() + seconds, row_limit_s=seconds
    )


def entry(name: str, step: Callable[[int], object], masks: str = "truncate", **more: bool) -> Entry:
    return Entry(name, lambda _inputs: step, masks, **more)  # type: ignore[arg-type]


# The command


def test_the_command_measures_what_is_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = ";".join(e.name for e in entries() if not e.compiles and e.group == "main")
    assert main(["--device", "cpu", "--quick", "--rows", rows, "--results", str(tmp_path)]) == 0
    (path,) = (tmp_path / "cpu").glob("throughput-*.json")
    (size,) = json.loads(path.read_text())["sizes"]
    found = {row["name"]: row for row in size["rows"]}
    assert size["gemm_flop_per_s"] > 0
    for name in (
        MAE,
        IJEPA,
        "fastjepa MAE",
        *(f"fastjepa I-JEPA, {m}" for m in ("truncate", "budget", "packed")),
    ):
        row = found[name]
        assert not row["red"], row
        assert len(row["seconds"]) == size["rounds"]
        assert row["images_per_s"] > 0
        assert row["mfu"] == pytest.approx(row["flop_per_s"] / size["gemm_flop_per_s"])
        laps = zip(row["flop"], row["seconds"], strict=True)
        assert row["flop_per_s"] == pytest.approx(median(flop / lap for flop, lap in laps))
        assert row["steps"] == 1
        assert row["kernels"] > 100, "ops of torch in a step"
        assert row["peak_bytes"] > 0
    assert (size["draws"], size["pool"]["steps"]) == (4, 16)
    for mode in ("truncate", "packed"):
        row, many = found[f"fastjepa I-JEPA, {mode}"], size["pool"]["masks"][mode]
        assert row["useful_flop"] == pytest.approx(many["useful_flop"], rel=0.02)
        assert f"{mode}: context tokens of these draws: {row['context_tokens']:.4g}; of many:" in masks_note(
            size
        )
    assert "4 batches of masks, 1 steps" in masks_note(size)
    assert found[MAE]["over_mae"] == found[IJEPA]["over_ijepa"] == 1
    assert "needs a GPU" in found["fastjepa I-JEPA, truncate, fp8"]["red"]
    # More context is more work, not slower code: it stands beside the images per second.
    assert found["fastjepa I-JEPA, packed"]["context_tokens"] > found[IJEPA]["context_tokens"]
    assert found["fastjepa I-JEPA, packed"]["useful_flop"] > found[IJEPA]["useful_flop"]
    table = markdown(size["rows"])
    assert masks_note(size) in path.with_suffix(".md").read_text()
    assert table in path.with_suffix(".md").read_text()
    assert table in capsys.readouterr().out
    assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


def test_a_quick_run_is_no_measurement_and_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bench.throughput.__main__.RESULTS", tmp_path)
    assert main(["--device", "cpu", "--quick", "--rows", "fastjepa MAE"]) == 0
    assert list(tmp_path.iterdir()) == []
    assert parse(["--device", "cpu"]).results == tmp_path


@pytest.mark.parametrize(
    ("arguments", "answer"),
    [
        (["--sizes", "tiny-7"], "no such size: tiny-7; there are base"),
        (["--rows", "fastjepa"], "no such row: fastjepa; there are"),
        (
            ["--batch", "8,8,8", "--sizes", "toy,base"],
            "--batch must be one number or one for each of 2 sizes",
        ),
    ],
)
def test_what_cannot_be_asked_for_is_answered(
    arguments: list[str], answer: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        parse(["--device", "cpu", *arguments])
    assert answer in capsys.readouterr().err


# Rows


def test_each_switch_stands_alone_over_a_plain_fastjepa() -> None:
    setting = replace(TOY, device=torch.device("cuda"), precision="bf16")
    plain = setting.config(*ours.PLAIN).speed
    for name, on in ours.SWITCHES.items():
        changed = setting.config(*ours.PLAIN, *on).speed
        key, _, value = name.partition("=")
        differing = {k for k in vars(plain) if getattr(plain, k) != getattr(changed, k)}
        assert differing == {key}
        assert str(getattr(changed, key)) == (value or "True")
    names = [e.name for e in entries()]
    assert len(set(names)) == len(names)
    assert {f"plain + {name}" for name in ours.SWITCHES} <= set(names)


def test_every_row_of_ours_is_a_configuration_on_a_gpu() -> None:
    setting = replace(TOY, size="huge", device=torch.device("cuda"), precision="bf16")
    configured = [e for e in entries() if isinstance(e.build, partial) and e.build.func is ours.steps_of]
    assert len(configured) >= 10
    for row in configured:
        config = setting.config(*row.build.args[0])  # type: ignore[attr-defined]
        assert (config.objective.name == "mae") == (row.masks == "mae")
        assert row.masks in ("mae", config.masks.mode)
        speed = config.speed
        graphs = speed.cuda_graph not in ("auto", "none")
        on_gpu = speed.target_stream or graphs or speed.target_precision == "fp8"
        assert (row.gpu_alone, row.compiles) == (on_gpu, speed.compile)


def test_rows_are_chosen_by_group_or_name_and_those_that_compile_come_last() -> None:
    assert {e.group for e in chosen(["main"])} == {"main"}
    assert [e.name for e in chosen([IJEPA])] == [IJEPA]
    assert not any(e.compiles for e in parse(["--device", "cpu", "--no-compile"]).entries)
    compiles = [e.compiles for e in chosen(["all"])]
    assert compiles == sorted(compiles)
    assert len(compiles) == len(entries())


def test_all_rows_see_the_same_images(inputs: Inputs) -> None:
    """Learners of one seed, in modes that leave fp32 results alone, lose the same at first."""
    data = TOY.config().data
    raw, normalised = inputs.pixels[1], inputs.normalised[1]
    mean, std = (torch.tensor(each)[:, None, None] for each in (data.mean, data.std))
    assert raw.dtype == torch.uint8
    assert torch.allclose((normalised * std + mean) * 255, raw.float(), atol=1e-3)
    losses = [
        float(ours.steps_of(("masks.mode=budget", *ours.PLAIN, *on), inputs)(0))  # type: ignore[arg-type]
        for on in ((), ours.SWITCHES["skip_dead_work"], ours.SWITCHES["fused_blocks"])
    ]
    assert losses == pytest.approx([losses[0]] * 3, rel=1e-4)


def test_masks_change_from_step_to_step_and_are_counted(inputs: Inputs) -> None:
    drawn = inputs.masks("truncate")
    assert len(drawn) == TOY.draws
    assert len({(m.context.shape, m.targets.shape) for m in drawn}) > 1
    assert inputs.context_tokens("truncate") == pytest.approx(
        sum(m.context.shape[1] for m in drawn) / TOY.draws
    )
    packed = inputs.masks("packed")
    lengths = [length for m in packed for length in tokens_of(m).context]
    assert sum(lengths) == sum(m.context.numel() for m in packed)
    assert inputs.context_tokens("packed") == pytest.approx(sum(lengths) / len(lengths))


@given(st.data())
def test_chosen_steps_are_distinct_and_the_same_each_time(data: st.DataObject) -> None:
    values = data.draw(st.lists(st.floats(1, 100), min_size=1, max_size=40))
    count = data.draw(st.integers(1, len(values)))
    kept = representative(values, count)
    assert len(set(kept)) == count
    assert kept == representative(values, count)
    assert set(representative(values, len(values))) == set(range(len(values)))


def test_no_more_steps_can_be_chosen_than_there_are() -> None:
    for count in (0, 3):
        with pytest.raises(ValueError, match=f"of 2 values 1 to 2 can be chosen, got {count}"):
            representative([1.0, 2.0], count)


@pytest.mark.parametrize("draws", [3, 6, 12])
@pytest.mark.parametrize(("size", "batch"), [("base", 128), ("huge", 64)])
def test_draws_have_the_mean_work_of_many(size: str, batch: int, draws: int) -> None:
    for mode in ("truncate", "packed"):
        many = population(replace(TOY, size=size, batch=batch, pool=64), mode).flop
        kept = [many[step] for step in representative(many, draws)]
        assert sum(kept) / draws == pytest.approx(sum(many) / len(many), rel=0.005)
        if draws == 12:  # and those of a round are not far from it
            for first in range(0, draws, 4):
                assert sum(kept[first : first + 4]) / 4 == pytest.approx(sum(many) / len(many), rel=0.05)


def test_a_step_of_ours_learns(inputs: Inputs) -> None:
    config = TOY.config("masks.mode=truncate")
    learner, batches = ours.learner_of(config, CPU), ours.batches_of(config, inputs)
    assert isinstance(learner.model, JEPA)
    weight = learner.model.encoder.get_parameter("blocks.0.mlp.fc1.weight")
    before = weight.clone()
    learner.step(batches[:1], ours.RATES)
    assert not torch.equal(before, weight)


# The race


def test_every_row_has_the_same_steps_in_the_same_round(inputs: Inputs) -> None:
    ran: dict[str, list[int]] = {"a": [], "b": []}
    race = race_of(inputs)
    for name in ran:
        race.add(entry(name, ran[name].append))
        ran[name].clear()
    race.run()
    assert ran["a"] == ran["b"] == [0, 1, 2, 3, 4, 5]
    assert [len(one.laps) for one in race.contestants] == [3, 3]
    assert len(race.gauge.gemm_s) == 3


def test_work_by_time_is_of_the_steps_that_ran(inputs: Inputs) -> None:
    race = race_of(inputs)
    race.add(entry("sound", lambda _number: time.sleep(0.002)))
    race.run()
    (one,), (row,) = race.contestants, rows_of(race)
    assert one.ran == [range(0, 2), range(2, 4), range(4, 6)]
    of_steps = [inputs.step_flop("truncate", [number]) for number in range(6)]
    assert row.flop == pytest.approx([sum(of_steps[i : i + 2]) / 2 for i in (0, 2, 4)])
    assert len(set(row.flop)) > 1, "masks change"
    assert row.flop_per_s == pytest.approx(median(f / s for f, s in zip(row.flop, row.seconds, strict=True)))


def test_a_row_that_fails_says_so_and_the_others_go_on(inputs: Inputs) -> None:
    def no_memory(_inputs: Inputs) -> Step:
        raise RuntimeError("CUDA out of memory. Tried to allocate 9 GiB\nmore lines")

    calls = 0

    def breaks_later(_number: int) -> None:
        nonlocal calls
        calls += 1
        if calls > 6:
            raise ValueError("odd")

    race = race_of(inputs)
    race.add(Entry("large", no_memory, "truncate"))
    race.add(entry("breaks", breaks_later))
    race.add(entry("sound", lambda _number: None))
    race.row_limit_s = 2.0  # more than collecting the garbage of many tests takes before it
    race.add(entry("slow", lambda _number: time.sleep(1.5)))
    race.row_limit_s = 60.0  # what is sound may take its time on a loaded machine
    race.add(entry("for a GPU", lambda _number: None, gpu_alone=True))
    race.run()
    rows = {row.name: row for row in rows_of(race)}
    assert rows["large"].red == "RuntimeError: CUDA out of memory. Tried to allocate 9 GiB"
    assert rows["breaks"].red == "ValueError: odd"
    assert rows["slow"].red == "TimeoutError: it took more than 2 s"
    assert rows["for a GPU"].red == "needs a GPU"
    assert not rows["sound"].red
    assert rows["sound"].images_per_s
    assert all(row.images_per_s is None for name, row in rows.items() if name != "sound")


def test_when_time_is_up_rows_say_so(inputs: Inputs) -> None:
    race = race_of(inputs, seconds=0.0)
    race.add(entry("late", lambda _number: None))
    race.run()
    (row,) = rows_of(race)
    assert row.red == "no time was left"
    assert "not measured: no time was left" in markdown(size_of(race, 0.0)["rows"])


def test_times_are_kept_where_time_is_up_before_there_are_as_many_again(inputs: Inputs) -> None:
    told = []
    race = race_of(inputs)
    race.add(entry("sound", lambda number: number))
    race.run(lambda: told.append(len(race.contestants[0].laps)))
    laps = list(race.contestants[0].laps)
    assert told == [2, 3], "after each round that gives a spread"
    race.run()
    assert race.contestants[0].laps != laps, "measured anew"
    laps = list(race.contestants[0].laps)
    race.deadline_s = time.monotonic()
    race.run()
    assert race.contestants[0].laps == laps


def test_a_row_that_does_not_stay_is_built_for_half_of_the_rounds_each_time(inputs: Inputs) -> None:
    built = 0

    def build(_inputs: Inputs) -> Step:
        nonlocal built
        built += 1
        return lambda number: number

    race = race_of(inputs)
    race.add(entry("stays", lambda number: number))
    race.add(Entry("goes", build, "truncate"))
    race.contestants[1].stays = False
    race._free(race.contestants[1])
    race.run()
    assert built == 3
    assert race.contestants[1].step is None
    assert len(race.contestants[1].laps) == race.rounds
    assert [row.how for row in rows_of(race)] == [
        "stayed in memory",
        "built twice, half of the rounds each time",
    ]


def test_a_limit_ends_what_takes_too_long_and_is_gone_after() -> None:
    with pytest.raises(TimeoutError, match="more than"), at_most(0.1):
        time.sleep(5)
    with at_most(0.2):
        pass
    time.sleep(0.25)


# Numbers


@given(st.lists(st.floats(0.1, 10), min_size=1, max_size=9), st.floats(0.1, 10))
def test_a_ratio_pairs_the_rounds(laps: list[float], times: float) -> None:
    slower = [lap * times for lap in laps]
    assert ratio(slower, laps) == pytest.approx(times)
    assert ratio(laps, laps) == 1
    assert ratio([], laps) is None


@given(st.lists(st.floats(0.1, 10), min_size=1, max_size=9))
def test_half_of_the_values_lie_between_the_quartiles(values: list[float]) -> None:
    low, high = quartiles(values)
    assert min(values) <= low <= median(values) <= high <= max(values)
    assert sum(value < low for value in values) <= math.ceil(len(values) / 4)
    assert sum(value > high for value in values) <= math.ceil(len(values) / 4)


@given(
    st.lists(
        st.tuples(st.integers(0, 50), st.integers(0, 20)).map(lambda p: (p[0], p[0] + p[1])), max_size=12
    )
)
def test_covered_counts_each_moment_once(spans: list[tuple[int, int]]) -> None:
    moments = {moment for start, end in spans for moment in range(start, end)}
    assert covered(spans) == len(moments)


def test_a_trace_counts_the_ops_of_a_call() -> None:
    x = torch.ones(8, 8)
    seen = trace(lambda: [torch.mm(x, x) for _ in range(5)], CPU)
    assert {k.name: k.calls for k in seen.kernels}["aten::mm"] == 5
    assert seen.calls >= 5


def test_the_line_of_a_row_has_all_columns(inputs: Inputs) -> None:
    race = race_of(inputs)
    race.add(entry(MAE, lambda _number: time.sleep(0.001), masks="mae"))
    race.run()
    (row,) = size_of(race, 1.0)["rows"]
    assert len(cells(row)) == len(COLUMNS)
    assert len(cells(row | {"images_per_s": None})) == len(COLUMNS)
    assert cells(row)[3] == "1.00"


def test_what_a_graph_holds_is_in_the_peak() -> None:
    assert most_bytes({"peak_bytes": 7, "held_bytes": 9}) == 9
    assert most_bytes({"peak_bytes": 12, "held_bytes": 9}) == 12
    assert most_bytes({"peak_bytes": 7, "held_bytes": None}) == 7
    assert most_bytes({"peak_bytes": None}) is None


@pytest.mark.parametrize(
    ("changed", "waits"),
    [
        ({}, True),
        ({"host_s": 0.089}, False),
        ({"busy_s": 0.05}, True),
        ({"busy_s": 0.099}, False),  # the host waits in turn, for reads of a busy device
        ({"held_bytes": None}, False),  # a CPU is its own host
        ({"seconds": []}, False),
    ],
)
def test_a_row_is_marked_where_the_device_waits_for_its_host(changed: dict[str, Any], waits: bool) -> None:
    row = {"held_bytes": 1, "host_s": 0.095, "seconds": [0.1, 0.1, 0.2]}
    assert waits_for_host(row | changed) == waits


def test_rows_that_were_left_out_are_said_not_to_be_measured(inputs: Inputs) -> None:
    race = race_of(inputs)
    race.add(entry(MAE, lambda _number: None, masks="mae"))
    race.run()
    rows = complete(size_of(race, 1.0)["rows"])
    assert [row["name"] for row in rows] == [e.name for e in entries()]
    assert [cells(row)[1] for row in rows[1:]] == ["not measured"] * (len(entries()) - 1)


def test_a_setting_is_the_size_that_it_says() -> None:
    huge = replace(TOY, size="huge").shape()
    assert (huge.width, huge.depth, huge.patch_size, huge.grid) == (1280, 32, 14, (16, 16))
    assert replace(TOY, size="large").predictor == (384, 12, 16)
    assert replace(TOY, size="base").decoder == (512, 8, 16)
    assert replace(TOY, size="small-6").shape().depth == 6
