"""What a person sees of a run."""

import io
import logging
import re

import pytest
from rich.console import Console

from fastjepa.engine.console import Progress, RunConsole, _view, clock
from fastjepa.engine.judge import Verdict

PROGRESS = Progress(
    step=1200,
    steps=300_000,
    loss=0.2345,
    images_per_second=12_345.6,
    data_wait_fraction=0.07,
    grad_norm=1.234,
    momentum=0.9961,
    target_std=0.81,
    token_rankme=321.9,
    skipped_steps=2,
    time_left_s=200_000,
    memory_gib=71.4,
)
VERDICT = Verdict("so far", knn_top1=0.5, linear_top1=0.625, rankme=99.7, target_std=0.7)


def drawn(progress: Progress, verdict: Verdict | None, width: int) -> list[str]:
    screen = io.StringIO()
    Console(file=screen, width=width, force_terminal=False).print(_view("a run", progress, verdict, width))
    return screen.getvalue().splitlines()


@pytest.mark.parametrize("width", [40, 60, 80, 100, 200])
def test_every_number_stands_beside_its_name_at_any_width(width: int) -> None:
    lines = drawn(PROGRESS, VERDICT, width)
    assert {len(line) for line in lines} == {min(width, 100)}
    text = "\n".join(lines)
    for pair in (
        "loss +0.2345", "grad norm +1.234", "momentum +0.9961", "images/s +12,346", "data wait +7%",
        "target std +0.81", "token rank +322", "skipped +2", "memory +71.4 GiB",
        "kNN +0.500", "linear +0.625", "RankMe +100",
    ):  # fmt: skip
        assert re.search(pair, text), pair
    assert "1200/300000" in text
    assert "55:33:20 left" in text


def test_numbers_that_there_are_none_of_are_left_out() -> None:
    mae = Progress(**vars(PROGRESS) | {"momentum": None, "memory_gib": None, "skipped_steps": 0})
    text = "\n".join(drawn(mae, None, 80))
    assert not re.search("momentum|memory|kNN|None", text)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0:00"), (59.9, "0:59"), (90, "1:30"), (3700, "1:01:40"), (360_000, "100:00:00")],
)
def test_clock(seconds: float, text: str) -> None:
    assert clock(seconds) == text


def test_other_ranks_are_silent_but_for_the_images_they_skip() -> None:
    screen = io.StringIO()
    console = RunConsole(active=False, title="a run", console=Console(file=screen, width=80, soft_wrap=True))
    log = logging.getLogger("fastjepa.data.unreadable")
    with console:
        console.say("hello")
        console.warn("careful")
        console.show_progress(PROGRESS)
        console.show_table([{"name": "x", "knn_top1": 0.1, "linear_top1": 0.2, "rankme": 3.0}])
        for _ in range(3):
            log.warning("skipped %s: %s", "[bold]a.png", "it is empty")
    assert screen.getvalue() == "warning: skipped [bold]a.png: it is empty\n"
    assert not logging.getLogger("fastjepa").handlers
