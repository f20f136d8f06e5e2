"""How the ops are measured, and what is written of it."""

import json
import random
from collections import Counter
from itertools import chain, repeat
from pathlib import Path
from typing import Any

import pytest
import torch

import fastjepa_kernels as fk
from bench.kernels import bench_gather, bench_loss, choices, machine, results
from bench.kernels.case import DEFAULT, Random
from bench.kernels.check import Verdicts
from bench.kernels.choices import Choice, Measurements, choices_made
from bench.kernels.clock import WallClock, Watch
from bench.kernels.entry import decides, enter
from bench.kernels.memory import peak_bytes
from bench.kernels.race import COPY, LEAST_ROUNDS, Race
from bench.kernels.session import Session
from bench.kernels.table import Row, cells, markdown, summary, time_of
from fastjepa_kernels.choice import Measured, fastest, parse_table

CPU = torch.device("cpu")
MB = 1 << 20


def race_of(**seconds: float) -> Race:
    """Ways of known speed; a copy of 1 MB takes a millisecond."""
    race = Race(WallClock(), copied_bytes=1_000_000)
    race.add(COPY, COPY, Watch("clock", lambda: 1e-3))
    kinds = {"ours": "fastjepa", "published": "published", "slow": "stock", "fast": "stock"}
    for name, each in seconds.items():
        race.add(name, kinds[name], Watch("clock", lambda each=each: each))  # type: ignore[misc]
    return race


def row(way: str, kind: str, seconds: float | None, **more: Any) -> Row:
    return Row("op", "case", "forward", "float32", way, kind, seconds=seconds, **more)


def test_a_wall_clock_goes_through_its_inputs_in_turn() -> None:
    calls: list[int] = []
    watch = WallClock().watch([lambda i=i: calls.append(i) for i in range(3)])  # type: ignore[misc]
    calls.clear()
    assert all(0 <= watch.run() < 1 for _ in range(6))
    assert calls == [0, 1, 2, 0, 1, 2]


def test_rounds_run_every_way_once_in_changing_order() -> None:
    order: list[str] = []

    def named(name: str) -> Watch:
        def run() -> float:
            order.append(name)
            return 1.0

        return Watch("clock", run)

    race = Race(WallClock(), copied_bytes=64)
    for name in "abc":
        race.add(name, "stock", named(name))
    for _ in range(50):
        race.round()
    rounds = ["".join(order[i : i + 3]) for i in range(0, len(order), 3)]
    assert {"".join(sorted(each)) for each in rounds} == {"abc"}
    assert len(set(rounds)) > 1
    race.round(without="b")
    assert [len(race.seconds[name]) for name in "abc"] == [51, 50, 51]


def test_a_race_ends_in_time_but_not_before_a_few_rounds() -> None:
    race = race_of(ours=1.0)
    race.run(budget_s=0)
    assert len(race.seconds["ours"]) == LEAST_ROUNDS
    race.run(budget_s=60, most_rounds=7)
    assert len(race.seconds["ours"]) == LEAST_ROUNDS + 7


def test_rows_say_how_many_times_as_fast() -> None:
    race = race_of(ours=2e-3, published=6e-3, slow=3e-3, fast=1e-3)
    race.run(budget_s=0)
    rows = {each.way: each for each in race.rows("op", "case", "forward", "float32", 500_000, {"ours": 7})}
    ours = rows["ours"]
    assert ours.seconds == 2e-3
    assert ours.over_published == pytest.approx(3)
    assert ours.over_stock == pytest.approx(0.5), "the best of the stock ways counts"
    # 0.5 MB in 2 ms, where a copy moves 2 MB in 1 ms.
    assert ours.gb_per_s == pytest.approx(0.25)
    assert ours.of_copy == pytest.approx(0.125)
    assert ours.peak_bytes == 7
    assert rows[COPY].of_copy == 1
    assert rows[COPY].over_stock is None


def test_the_median_counts_and_not_the_mean() -> None:
    race = Race(WallClock(), copied_bytes=64)
    slow_once = chain([1.0, 90.0], repeat(1.0))
    race.add("ours", "fastjepa", Watch("clock", lambda: next(slow_once)))
    race.run(budget_s=0)
    assert race.rows("op", "case", "forward", "float32", 1, {})[0].seconds == 1.0


def test_peak_memory_is_what_is_held_at_a_time() -> None:
    held = torch.ones(MB // 4)

    def call() -> torch.Tensor:
        one = torch.ones(MB // 4)  # 1 MB
        two = one + held  # 2 MB
        del one  # 1 MB
        three = torch.cat([two, two])  # 3 MB
        return three[:1].clone()

    assert 3 * MB <= peak_bytes(call) < 3 * MB + 10_000
    assert peak_bytes(lambda: held.add_(1)) < 10_000
    before = [torch.ones(MB)]
    assert peak_bytes(before.clear) < 10_000, "what was held before does not count"


def test_peak_memory_sees_the_backward_pass() -> None:
    x = torch.ones(MB // 4, requires_grad=True)

    def call() -> torch.Tensor:
        (gradient,) = torch.autograd.grad((x.exp() + 1).sum(), x)
        return gradient

    assert 2 * MB <= peak_bytes(call) < 4 * MB


def test_choices_are_seen_in_both_passes() -> None:
    x = torch.randn(2, 5, 6, requires_grad=True)
    with choices_made() as made:
        fk.gather_tokens(x, torch.zeros(2, 3, dtype=torch.long)).sum().backward()
    assert [(choice.op, choice.size) for choice in made] == [
        ("gather_tokens", (6, 6)),
        ("gather_tokens_backward", (6, 6)),
    ]
    assert made[0].offered == tuple(fk.implementations("gather_tokens", "cpu"))
    with choices_made() as again:
        pass
    fk.gather_tokens(x, torch.zeros(2, 3, dtype=torch.long))
    assert again == []


def test_the_fastest_is_chosen_and_the_first_of_two_alike() -> None:
    small, large = Choice("op", (1,), ("cpp", "torch")), Choice("op", (9,), ("cpp", "torch"))
    single = Choice("other", (1,), ("torch",))
    measured = Measurements()
    measured.add([small, single], [row(f"{DEFAULT}:cpp", "implementation", 3.0), row("x", "stock", 0.1)])
    measured.add([small], [row(f"{DEFAULT}:torch", "implementation", 2.0), row(DEFAULT, "fastjepa", 0.1)])
    measured.add(
        [large],
        [row(f"{DEFAULT}:cpp", "implementation", 1.01), row(f"{DEFAULT}:torch", "implementation", 1.0)],
    )
    assert measured.fastest() == {small: "torch", large: "cpp"}


def test_a_table_is_read_as_it_was_written_and_keeps_what_was_not_measured(tmp_path: Path) -> None:
    offered = ("triton", "torch")
    first = {Choice("a", (64, 24), offered): "triton", Choice("a", (8, 24), offered): "torch"}
    path = choices.write(tmp_path, "NVIDIA H200", first, {"torch": "2"})
    assert path == tmp_path / "nvidia_h200.json"
    choices.write(tmp_path, "NVIDIA H200", {Choice("b", (), offered): "torch"}, {"torch": "3"})
    table = parse_table(path.read_text())
    assert table == {
        "a": (Measured((8, 24), "torch"), Measured((64, 24), "triton")),
        "b": (Measured((), "torch"),),
    }
    assert fastest(table["a"], (60, 24)) == "triton"
    assert json.loads(path.read_text())["measured"] == {"torch": "3"}
    choices.write(tmp_path, "NVIDIA H200", {Choice("a", (8, 24), offered): "triton"}, {})
    assert parse_table(path.read_text())["a"] == (Measured((8, 24), "triton"),)


def test_nothing_to_choose_writes_no_table(tmp_path: Path) -> None:
    assert choices.write(tmp_path / "tables", "cpu", {}, {}) is None
    assert not (tmp_path / "tables").exists()


def test_phases_that_decide() -> None:
    gather, loss = bench_gather.cases("small", torch.float32)[0], bench_loss.cases("small", torch.float32)[0]
    assert [phase for phase in gather.bytes_moved if decides(gather, phase)] == ["forward", "backward"]
    # Its gradient is made in the forward pass.
    assert [phase for phase in loss.bytes_moved if decides(loss, phase)] == ["forward+backward"]


def test_what_is_red_has_no_number() -> None:
    case = bench_gather.cases("small", torch.float32)[0]
    verdicts = Verdicts(right=["published", "index_select"], red={DEFAULT: "result 0 is wrong"})
    entry = enter(case, "forward", verdicts, WallClock(1), Random.on(CPU), copied_bytes=64)
    (only,) = entry.rows()
    assert (only.way, only.seconds, only.red) == (DEFAULT, None, "result 0 is wrong")
    assert cells(only)[1] == "red: result 0 is wrong"
    assert " red |" in summary([only])


def test_a_way_that_is_not_right_is_not_timed() -> None:
    case = bench_gather.cases("small", torch.float32)[0]
    verdicts = Verdicts(right=[DEFAULT, "index_select"], red={"published": "result 0 is wrong"})
    entry = enter(case, "forward", verdicts, WallClock(1), Random.on(CPU), copied_bytes=64)
    entry.race.run(budget_s=0)
    timed = {each.way for each in entry.rows() if each.seconds is not None}
    assert timed == {DEFAULT, "index_select", COPY}
    assert entry.choices[0].op == "gather_tokens"


def test_a_red_implementation_has_no_number_and_the_others_have() -> None:
    case = bench_gather.cases("small", torch.float32)[0]
    all_right = Verdicts(right=[DEFAULT, f"{DEFAULT}:torch", f"{DEFAULT}:cpp", "index_select"])
    verdicts = all_right.without({f"{DEFAULT}:cpp": "result 0 is wrong"})
    assert not verdicts.ours_are_right
    entry = enter(case, "forward", verdicts, WallClock(1), Random.on(CPU), copied_bytes=64)
    entry.race.run(budget_s=0)
    rows = {each.way: each for each in entry.rows()}
    assert rows[f"{DEFAULT}:cpp"].red == "result 0 is wrong"
    assert {way for way, each in rows.items() if each.seconds} == {
        DEFAULT, f"{DEFAULT}:torch", "index_select", COPY,
    }  # fmt: skip


def test_what_no_graph_can_hold_does_not_decide() -> None:
    choice = Choice("op", (1,), ("varlen", "triton"))
    rows = [
        row(f"{DEFAULT}:varlen", "implementation", 1.0, how="launches"),
        row(f"{DEFAULT}:triton", "implementation", 2.0, how="graph"),
    ]
    measured = Measurements()
    measured.add([choice], rows, needs_graph=True)
    assert measured.fastest() == {choice: "triton"}
    measured = Measurements()
    measured.add([choice], rows)
    assert measured.fastest() == {choice: "varlen"}


def test_a_session_writes_results_and_a_table_of_what_is_right(tmp_path: Path) -> None:
    session = Session(WallClock(), seconds_each=0.1, copied_bytes=64)
    choice = Choice("gather_tokens", (8, 8), ("cpp", "torch"))
    rows = [row(f"{DEFAULT}:{name}", "implementation", each) for name, each in (("cpp", 1.0), ("torch", 2.0))]
    session.rows += rows
    session.measurements.add([choice], rows)
    session.left_out.append("something large")
    session.write(tmp_path / "results", None, minutes=3)
    assert not (tmp_path / "tables").exists()

    (path,) = (tmp_path / "results" / "cpu").glob("*.json")
    kept = json.loads(path.read_text())
    assert kept["minutes"] == 3
    assert kept["left_out"] == ["something large"]
    assert [each["seconds"] for each in kept["rows"]] == [1.0, 2.0]
    assert {"device", "date", "commit", "torch", "triton", "python", "threads"} <= set(kept)
    assert "something large" in path.with_suffix(".md").read_text()

    session.write(None, tmp_path / "tables")
    assert parse_table((tmp_path / "tables" / "cpu.json").read_text())["gather_tokens"][0].fastest == "cpp"


def test_rounds_are_as_many_as_the_time_holds() -> None:
    race = race_of(ours=1.0)
    assert Session(WallClock(), seconds_each=0, copied_bytes=64).rounds(race) == LEAST_ROUNDS
    assert Session(WallClock(), seconds_each=100, copied_bytes=64).rounds(race) == 100
    assert race.seconds["ours"] == [], "the round that measures a round does not count"


def test_the_committed_tables_name_what_there_is() -> None:
    for path in choices.TABLES.glob("*.json"):
        for op, rows in parse_table(path.read_text()).items():
            assert rows
            assert {each.fastest for each in rows} <= {way.name for way in fk.choice._OPS[op].ways}


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(2.5, "2.5 s"), (0.1234, "123 ms"), (2e-3, "2 ms"), (1.5e-5, "15 µs"), (2e-7, "200 ns")],
)
def test_times_have_units(seconds: float, text: str) -> None:
    assert time_of(seconds) == text


def test_tables_are_markdown_in_line() -> None:
    rows = [
        row(DEFAULT, "fastjepa", 1e-3, bytes_moved=5_000_000, gb_per_s=5.0, of_copy=0.5, over_stock=2.0),
        row("index_select", "stock", 2e-3, how="launches", bytes_moved=5_000_000, over_stock=1.0),
    ]
    for text in (markdown(rows), summary(rows)):
        lines = [line for line in text.splitlines() if line.startswith("|")]
        assert len({len(line) for line in lines}) == 1
        assert len({line.count("|") for line in lines}) == 1
    assert "(launches)" in markdown(rows)
    assert "index_select, 2 ms" in summary(rows)
    assert Counter(markdown(rows))["#"] == 3


def test_facts_name_the_machine() -> None:
    facts = machine.facts(CPU)
    assert facts["device"] == "cpu"
    assert facts["torch"] == torch.__version__
    assert facts["threads"] == torch.get_num_threads()
    assert "cuda" not in facts
    assert machine.installed("torch")
    assert machine.installed(f"nothing-{random.random()}") is None
    assert results.page(facts, [], []).startswith("# cpu\n")
