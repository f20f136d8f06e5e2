"""The page: HTML around the pictures, one file that needs nothing else."""

import base64
import math
from dataclasses import dataclass
from html import escape
from pathlib import Path

from fastjepa.report.load import Probe, Run
from fastjepa.report.status import Status
from fastjepa.report.times import Part
from fastjepa.report.verdict import TRAINED, percent, trained_probe

# For those who have not seen such a page before.
_TRAINED_TO = {
    "jepa": (
        "An encoder of images, trained without labels: from the part of an image that it sees, it is to "
        "predict what a copy of itself that follows slowly, the target encoder, says of the hidden parts."
    ),
    "mae": (
        "An encoder of images, trained without labels: from the part of an image that it sees, the hidden "
        "parts are to be painted."
    ),
}
_JUDGED_BY = (
    "What it has learned is judged by classes it was never told: by a linear classifier on its features "
    "(linear probe), and by the nearest images that have labels (kNN). It is to beat raw pixels and itself "
    "untrained."
)


@dataclass(frozen=True)
class Picture:
    """PNGs with words around them; `caption` is HTML. Several PNGs are parts of one picture.

    Attributes:
        alt: what they show, in words and numbers, for those who do not see them; plain text.
        is_chart: drawn in ink on white, so that it may be turned to light on dark.
    """

    title: str
    caption: str
    pngs: list[bytes]
    alt: str = ""
    is_chart: bool = False


@dataclass(frozen=True)
class Page:
    """What stands on the page, from top to bottom."""

    run: Run
    status: Status
    written: str  # when; "" on the page of a run that has ended, which is the same whenever it is written
    warning: str | None
    verdict: list[str]
    bars: Picture | None
    events: list[str]  # what befell the run besides training
    curves: list[Picture]
    times: list[Part]
    patches: list[Picture]


def render(page: Page, refresh_s: int | None = None) -> str:
    """The whole page as HTML, with nothing outside it: no file, no font, no address.

    Args:
        page: what stands on it.
        refresh_s: seconds after which a browser loads it again, where it stands; None: never.
    """
    name = escape(page.run.summary.name)
    sections = [section for section in _sections(page) if section[2]]
    links = "".join(f'<li><a href="#{anchor}">{anchor.title()}</a></li>' for anchor, *_ in sections)
    nav = f'<nav aria-label="Parts of this page"><ul>{links}</ul></nav>' if sections else ""
    body = "\n".join(
        f'<section aria-labelledby="{anchor}"><h2 id="{anchor}">{title}</h2>{html}</section>'
        for anchor, title, html in sections
    )
    css = Path(__file__).with_name("page.css").read_text(encoding="utf-8")
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1"><link rel="icon" href="data:,">'
        f"<title>{name}</title><style>{css}</style>{_refresh(refresh_s)}</head>\n"
        f"<body><header>{_head(page)}</header>\n{nav}\n<main>\n{body}\n</main></body></html>\n"
    )


def _refresh(refresh_s: int | None) -> str:
    """A reload keeps the place on the page, which the tag for browsers without scripts does not."""
    if refresh_s is None:
        return ""
    return (
        f"<script>setTimeout(() => location.reload(), {1000 * refresh_s})</script>"
        f'<noscript><meta http-equiv="refresh" content="{refresh_s}"></noscript>'
    )


def _head(page: Page) -> str:
    run = page.run
    parts = [f"<h1>{escape(run.summary.name)}</h1>", f'<p class="muted">{escape(_subtitle(page))}</p>']
    if run.summary.objective in _TRAINED_TO:
        judged = f" {_JUDGED_BY}" if run.summary.probes else ""
        parts.append(f"<p>{_TRAINED_TO[run.summary.objective]}{judged}</p>")
    parts.append(_status(page))
    if page.warning is not None:
        parts.append(f'<p class="warning"><b>Warning:</b> {escape(page.warning)}</p>')
    parts.append(f'<p class="verdict">{escape(page.verdict[0])}</p>')
    parts += [f"<p>{escape(sentence)}</p>" for sentence in page.verdict[1:]]
    if run.summary.probe_note:
        parts.append(f'<p class="muted">{escape(run.summary.probe_note)}</p>')
    parts.append(_tiles(page))
    return "\n".join(parts)


def _status(page: Page) -> str:
    """What has become of a run that has not ended."""
    status = page.status
    if status.state == "ended":
        return ""
    of = "" if status.planned is None else f" of {status.planned:,}"
    at = f"step {status.step:,}{of}"
    if status.state == "going" and status.step == 0:
        words = "<b>Live:</b> no step has been logged yet."
    elif status.state == "going":
        left = "" if status.left_s is None else f", about {duration(status.left_s)} of training left"
        words = f"<b>Live:</b> {at}{left}."
    elif status.state == "stopped":
        words = f"<b>Stopped</b> at {at}, as it was told to. The same command resumes it."
    else:
        words = (
            f"<b>Broken off:</b> no process trains here any more, and the last row is of {at}. "
            "What it printed last says why. The same command resumes it from its newest checkpoint."
        )
    bar = ""
    if status.planned:
        bar = f'<progress max="{status.planned}" value="{status.step}" aria-label="Steps done"></progress>'
    written = f'<span class="muted">Page written {escape(page.written)}.</span>'
    return f'<div class="status {status.state.replace(" ", "-")}">{words}{bar}{written}</div>'


def _sections(page: Page) -> list[tuple[str, str, str]]:
    """Anchor, title and HTML of each; HTML is "" where there is nothing to show."""
    run = page.run
    bars = "" if page.bars is None else _figure(page.bars)
    numbers = _table(run.summary.probes) if run.summary.probes else ""
    events = "".join(f'<p class="event">{escape(event)}</p>' for event in page.events)
    curves = f'<div class="curves">{"".join(map(_figure, page.curves))}</div>' if page.curves else ""
    missing = "".join(f"<li>{escape(note)}</li>" for note in run.notes)
    config = f"<details><summary>config.yaml</summary><pre>{escape(run.config)}</pre></details>"
    return [
        (
            "learned",
            "What the encoder learned",
            f'<div class="wide">{bars}{numbers}</div>' if numbers else "",
        ),
        ("training", "How training went", events + curves),
        ("time", "Where the time went", _times(page.times)),
        ("pictures", "What it sees", "".join(map(_figure, page.patches))),
        ("missing", "What is missing", f"<ul>{missing}</ul>" if missing else ""),
        ("config", "Configuration", config if run.config else ""),
    ]


def _subtitle(page: Page) -> str:
    summary = page.run.summary
    parts = [summary.objective.upper()]
    if page.status.state == "ended":
        parts.append(f"{page.status.step:,} steps")
        if summary.images is not None:
            parts.append(f"{summary.images:,} images")
    elif page.run.metrics:
        parts.append(f"at step {page.status.step:,}")
    parts += [summary.precision, summary.device]
    parts += [f"{package} {version}" for package, version in summary.versions.items()]
    return " · ".join(part for part in parts if part)


def _tiles(page: Page) -> str:
    """The numbers to remember, as far as there are any."""
    run = page.run
    summary, trained = run.summary, trained_probe(run.summary)
    tiles: list[tuple[str, str]] = []
    if trained is not None and trained.linear_top1 is not None:
        tiles.append((percent(trained.linear_top1), "linear probe"))
    if trained is not None and trained.knn_top1 is not None:
        tiles.append((percent(trained.knn_top1), "kNN"))
    last = run.metrics[-1] if run.metrics else {}
    train_s, images = last.get("elapsed_s", summary.train_s), last.get("images", summary.images)
    if train_s:
        tiles.append((duration(train_s), "training time"))
        if images:
            tiles.append((f"{images / train_s:,.0f}", "images / s, whole run"))
    spent = {part.name: part.seconds for part in page.times}
    if "waiting for data" in spent and (steps_s := spent["training"] + spent["waiting for data"]):
        tiles.append((percent(spent["waiting for data"] / steps_s), "of training time waiting for data"))
    if (tokens := _mean(run, "context_tokens")) is not None:
        tiles.append((f"{tokens:.1f}", "context tokens per image"))
    if not tiles:
        return ""
    return (
        '<div class="tiles">'
        + "".join(f"<div><b>{n}</b><span>{words}</span></div>" for n, words in tiles)
        + "</div>"
    )


def _mean(run: Run, key: str) -> float | None:
    values = [row[key] for row in run.metrics if math.isfinite(row.get(key, math.nan))]
    return sum(values) / len(values) if values else None


def _table(probes: tuple[Probe, ...]) -> str:
    rows = []
    for probe in probes:
        cells = [
            "–" if probe.linear_top1 is None else percent(probe.linear_top1),
            "–" if probe.knn_top1 is None else percent(probe.knn_top1),
            "–" if probe.rankme is None else f"{probe.rankme:.1f}",
            "–" if probe.target_std is None else f"{probe.target_std:.2f}",
        ]
        kind = "trained" if probe.name in TRAINED else "baseline"
        rows.append(_row(escape(probe.name), cells, kind))
    names = ["features", "linear", "kNN", "RankMe", "token std"]
    return f'<div class="table"><h3>All numbers</h3>{_tabled(names, rows)}</div>'


def _times(parts: list[Part]) -> str:
    whole_s = sum(part.seconds for part in parts)
    if not whole_s:
        return ""
    shares = [(part, part.seconds / whole_s) for part in parts]
    bar = "".join(
        f'<span style="flex:{share:.4f} 0 0;background:var(--{part.colour})"></span>'
        for part, share in shares
    )
    rows = [
        _row(
            f'<span class="swatch" style="color:var(--{part.colour})"></span>{part.name}',
            [duration(part.seconds), percent(share)],
        )
        for part, share in shares
    ]
    unnoted = "" if len(parts) > 2 else " This run did not note what judging, saving and starting up took."
    words = (
        "Over all processes that the run took, Python's imports left out. Saving is what no step could run "
        f"beside; checkpoints are written in the background.{unnoted}"
    )
    said = ", ".join(f"{part.name} {percent(share)}" for part, share in shares)
    return (
        f'<div class="table times"><p class="muted">{words}</p>'
        f'<div class="bar" role="img" aria-label="Shares of the time: {said}">{bar}</div>'
        f"{_tabled(['part', 'time', 'share'], rows)}</div>"
    )


def _row(name: str, cells: list[str], kind: str = "") -> str:
    attribute = f' class="{kind}"' if kind else ""
    return f'<tr{attribute}><th scope="row">{name}</th>{"".join(f"<td>{cell}</td>" for cell in cells)}</tr>'


def _tabled(names: list[str], rows: list[str]) -> str:
    head = "".join(f'<th scope="col">{name}</th>' for name in names)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>"


def _figure(picture: Picture) -> str:
    count = len(picture.pngs)
    images = []
    for number, png in enumerate(picture.pngs, start=1):
        part = f"Part {number} of {count}. " if count > 1 else ""
        alt = escape(f"{part}{picture.alt or picture.title}")
        images.append(f'<img alt="{alt}" src="data:image/png;base64,{base64.b64encode(png).decode()}">')
    shown = f'<div class="pngs">{"".join(images)}</div>' if images else ""
    kind = ' class="chart"' if picture.is_chart else ""
    return (
        f"<figure{kind}><figcaption><h3>{escape(picture.title)}</h3><p>{picture.caption}</p></figcaption>"
        f"{shown}</figure>"
    )


def duration(seconds: float) -> str:
    """For people, to two digits or so."""
    minutes, hours = seconds / 60, seconds / 3600
    if minutes < 2:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    if hours < 2:
        return f"{minutes:.0f} min"
    return f"{hours:.1f} h" if hours < 48 else f"{hours / 24:.1f} days"
