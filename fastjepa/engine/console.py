"""What a person sees of a run: one live view on a terminal, plain lines elsewhere."""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType

from rich.console import Console, Group
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table

from fastjepa.engine.judge import Verdict


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
    time_left_s: float
    memory_gib: float | None


@dataclass
class RunConsole:
    """Prints for rank 0, and nothing for the others."""

    active: bool
    title: str
    console: Console = field(default_factory=lambda: Console(soft_wrap=True, highlight=False))
    verdict: Verdict | None = None
    _live: Live | None = None

    def __enter__(self) -> "RunConsole":
        if self.active and sys.stdout.isatty():
            self._live = Live(console=self.console, refresh_per_second=4, transient=True)
            self._live.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._live is not None:
            self._live.stop()

    def say(self, text: str) -> None:
        """A line that stays."""
        if self.active:
            self.console.print(text, markup=False)

    def warn(self, text: str) -> None:
        if self.active:
            self.console.print(f"warning: {text}", style="yellow", markup=False)

    def show_verdict(self, step: int, verdict: Verdict) -> None:
        self.verdict = verdict
        self.say(
            f"step {step:>6}  {verdict.name}: kNN {verdict.knn_top1:.3f}  linear {verdict.linear_top1:.3f}  "
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
            self._live.update(_view(self.title, progress, self.verdict))


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
    if p.memory_gib is not None:
        parts.append(f"memory {p.memory_gib:.1f} GiB")
    return "  ".join([*parts, f"{clock(p.time_left_s)} left"])


def _view(title: str, p: Progress, verdict: Verdict | None) -> Panel:
    table = Table.grid(padding=(0, 3))
    for _ in range(4):
        table.add_column(style="dim")
        table.add_column(justify="right", min_width=9)
    knn = "–" if verdict is None else f"{verdict.knn_top1:.3f}"
    linear = "–" if verdict is None else f"{verdict.linear_top1:.3f}"
    rank = "–" if verdict is None else f"{verdict.rankme:.0f}"
    momentum = "–" if p.momentum is None else f"{p.momentum:.4f}"
    speed = f"{p.images_per_second:,.0f}"
    table.add_row("step", f"{p.step}/{p.steps}", "loss", f"{p.loss:.4f}", "kNN", knn, "images/s", speed)
    table.add_row(
        "left", clock(p.time_left_s), "grad norm", f"{p.grad_norm:.3f}", "linear", linear,
        "data wait", f"{p.data_wait_fraction:.0%}",
    )  # fmt: skip
    table.add_row(
        "momentum", momentum, "target std", f"{p.target_std:.2f}", "RankMe", rank,
        "memory", "–" if p.memory_gib is None else f"{p.memory_gib:.1f} GiB",
    )  # fmt: skip
    bar = ProgressBar(total=p.steps, completed=p.step)
    return Panel(Group(bar, table), title=title, border_style="dim", padding=(0, 1))


def clock(seconds: float) -> str:
    """90 -> '1:30'; 3700 -> '1:01:40'."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def _table(rows: Sequence[Mapping[str, float | str]]) -> Table:
    table = Table(box=None, padding=(0, 2), header_style="bold")
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
