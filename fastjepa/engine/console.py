"""What a person sees of a run: one live view on a terminal, plain lines elsewhere."""

import logging
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import TextIO, cast

from rich.console import Console, Group
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table

from fastjepa.engine.judge import Verdict
from fastjepa.engine.output import Output

WIDEST_VIEW = 100  # columns: numbers far apart are hard to read


def _console() -> Console:
    """On standard output, whatever becomes of that."""
    return Console(file=cast(TextIO, Output(sys.stdout)), soft_wrap=True, highlight=False)


@dataclass(frozen=True)
class Progress:
    """Where a run is, for people."""

    step: int
    steps: int
    loss: float
    images_per_second: float
    data_wait_fraction: float
    grad_norm: float
    momentum: float | None
    target_std: float
    token_rankme: float
    skipped_steps: int
    time_left_s: float
    memory_gib: float | None


@dataclass
class RunConsole:
    """Prints for rank 0, and nothing for the others."""

    active: bool
    title: str
    console: Console = field(default_factory=_console)
    verdict: Verdict | None = None
    _live: Live | None = None
    _warned: set[str] = field(default_factory=set)

    def __enter__(self) -> "RunConsole":
        self._log = _Handler(self._warn_once)
        logging.getLogger("fastjepa").addHandler(self._log)
        if self.active and self.console.file.isatty() and not self.console.is_dumb_terminal:
            # Drawn when there is something new: a view that redraws itself cannot be selected or copied from.
            self._live = Live(console=self.console, auto_refresh=False, transient=True)
            self._live.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        logging.getLogger("fastjepa").removeHandler(self._log)
        if self._live is not None:
            self._live.stop()

    def say(self, text: str) -> None:
        """A line that stays."""
        if self.active:
            self.console.print(text, markup=False)

    def warn(self, text: str) -> None:
        if self.active:
            self.console.print(f"warning: {text}", style="yellow", markup=False)

    def _warn_once(self, text: str) -> None:
        """For what each rank finds out for itself, and at every pass over the images again."""
        if text not in self._warned:
            self._warned.add(text)
            self.console.print(f"warning: {text}", style="yellow", markup=False)

    def show_verdict(self, step: int, verdict: Verdict) -> None:
        self.verdict = verdict
        self.say(
            f"step {step}  {verdict.name}: kNN {verdict.knn_top1:.3f}  linear {verdict.linear_top1:.3f}  "
            f"RankMe {verdict.rankme:.0f}"
            + ("" if verdict.target_std is None else f"  target std {verdict.target_std:.2f}")
        )

    def show_table(self, rows: Sequence[Mapping[str, float | str]]) -> None:
        """Every encoder judged, beside its baselines."""
        if self.active:
            self.console.print(_table(rows))

    def show_progress(self, progress: Progress) -> None:
        if not self.active:
            return
        if self._live is None:
            self.say(_line(progress))
        else:
            view = _view(self.title, progress, self.verdict, self.console.width)
            self._live.update(view, refresh=True)


class _Handler(logging.Handler):
    """Passes on what the lower layers log."""

    def __init__(self, say: Callable[[str], None]) -> None:
        super().__init__(logging.WARNING)
        self.say = say

    def emit(self, record: logging.LogRecord) -> None:
        self.say(record.getMessage())


def _line(p: Progress) -> str:
    parts = [
        f"step {p.step:>6}/{p.steps}",
        f"loss {p.loss:.4f}",
        f"{p.images_per_second:,.0f} images/s",
        f"data wait {p.data_wait_fraction:.0%}",
        f"grad norm {p.grad_norm:.3f}",
        f"target std {p.target_std:.2f}",
        f"token rank {p.token_rankme:.0f}",
    ]
    if p.momentum is not None:
        parts.append(f"momentum {p.momentum:.4f}")
    if p.skipped_steps:
        parts.append(f"skipped {p.skipped_steps}")
    if p.memory_gib is not None:
        parts.append(f"memory {p.memory_gib:.1f} GiB")
    return "  ".join([*parts, f"{clock(p.time_left_s)} left"])


def _view(title: str, p: Progress, verdict: Verdict | None, width: int) -> Panel:
    numbers = [("loss", f"{p.loss:.4f}"), ("grad norm", f"{p.grad_norm:.3f}")]
    if p.momentum is not None:
        numbers.append(("momentum", f"{p.momentum:.4f}"))
    numbers += [
        ("images/s", f"{p.images_per_second:,.0f}"),
        ("data wait", f"{p.data_wait_fraction:.0%}"),
        ("target std", f"{p.target_std:.2f}"),
        ("token rank", f"{p.token_rankme:.0f}"),
    ]
    if p.skipped_steps:
        numbers.append(("skipped", f"{p.skipped_steps:,}"))
    if p.memory_gib is not None:
        numbers.append(("memory", f"{p.memory_gib:.1f} GiB"))
    if verdict is not None:
        numbers += [("kNN", f"{verdict.knn_top1:.3f}"), ("linear", f"{verdict.linear_top1:.3f}")]
        numbers.append(("RankMe", f"{verdict.rankme:.0f}"))

    inside = min(width, WIDEST_VIEW) - 4  # of the frame and its padding
    columns = max(1, inside // 24)  # "target std", a number of up to 9 characters, and space around them
    table = Table.grid(padding=(0, 3, 0, 0))
    for _ in range(columns):
        table.add_column(style="dim", no_wrap=True, min_width=10)
        table.add_column(justify="right", no_wrap=True, min_width=8)
    for first in range(0, len(numbers), columns):
        table.add_row(*(cell for pair in numbers[first : first + columns] for cell in pair))

    where = Table.grid(padding=(0, 2, 0, 0), expand=True)
    where.add_column(ratio=1)
    where.add_column(justify="right", no_wrap=True)
    bar = ProgressBar(total=p.steps, completed=p.step)
    where.add_row(bar, f"step {p.step}/{p.steps}, {clock(p.time_left_s)} left")
    return Panel(Group(where, table), title=title, border_style="dim", padding=(0, 1), width=inside + 4)


def clock(seconds: float) -> str:
    """90 -> '1:30'; 3700 -> '1:01:40'."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def _table(rows: Sequence[Mapping[str, float | str]]) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="bold")
    table.add_column("features")
    for heading in ("kNN", "linear", "RankMe", "target std"):
        table.add_column(heading, justify="right")
    for row in rows:
        std = row.get("target_std")
        table.add_row(
            str(row["name"]),
            f"{row['knn_top1']:.3f}",
            f"{row['linear_top1']:.3f}",
            f"{row['rankme']:.0f}",
            "" if std is None else f"{std:.2f}",
        )
    return table
