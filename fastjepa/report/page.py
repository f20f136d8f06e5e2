"""The page: HTML and CSS around the pictures, one file that needs nothing else."""

import base64
import math
from dataclasses import dataclass
from html import escape

from fastjepa.report.load import Probe, Run
from fastjepa.report.verdict import TRAINED, percent, trained_probe

_CSS = """
:root { --ink: #1f2933; --muted: #5a6572; --line: #e3e7eb; --blue: #17669b; --red: #b8432f; }
* { box-sizing: border-box; }
body { margin: 0; background: #f6f7f8; color: var(--ink); font: 16px/1.5 system-ui, sans-serif; }
main { max-width: 1240px; margin: 0 auto; padding: 24px 16px 64px; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 8px 0 4px; overflow-wrap: anywhere; }
h2 { font-size: 1.2rem; margin: 40px 0 4px; }
h3 { font-size: 1rem; margin: 0; }
p { margin: 4px 0 12px; max-width: 75ch; }
.muted, figcaption p { color: var(--muted); font-size: .9rem; }
.verdict { font-size: 1.15rem; font-weight: 600; margin-top: 20px; }
.warning { border-left: 4px solid var(--red); padding: 8px 14px; background: #fdf1ee; max-width: none; }
.tiles div, figure, .table, details {
  background: #fff; border: 1px solid var(--line); border-radius: 8px; padding: 12px 14px;
}
.tiles { display: grid; gap: 12px; margin: 20px 0; }
.tiles { grid-template-columns: repeat(auto-fit, minmax(145px, 1fr)); }
.tiles b { display: block; font-size: 1.5rem; line-height: 1.2; font-variant-numeric: tabular-nums; }
.tiles span { color: var(--muted); font-size: .85rem; }
.curves, .wide, .pngs { display: grid; gap: 16px; align-items: start; }
.curves { grid-template-columns: repeat(auto-fill, minmax(min(100%, 370px), 1fr)); }
.wide { grid-template-columns: repeat(auto-fit, minmax(min(100%, 480px), 1fr)); }
.pngs { grid-template-columns: repeat(auto-fit, minmax(min(100%, 440px), 1fr)); }
figure { margin: 0; min-width: 0; }
figure img { display: block; width: 100%; max-width: 600px; height: auto; }
.pngs { margin-top: 10px; }
figure + figure { margin-top: 16px; }
.curves figure { margin-top: 0; }
figcaption p { margin: 0; }
.table { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; font-size: .95rem; }
th, td { text-align: right; padding: 7px 0 7px 14px; border-bottom: 1px solid var(--line); }
th:first-child, td:first-child { text-align: left; padding-left: 0; }
th { color: var(--muted); font-weight: 500; font-size: .85rem; }
tr:last-child td { border-bottom: 0; }
tr.trained td { font-weight: 600; color: var(--blue); }
.chip { font-weight: 600; white-space: nowrap; }
.chip::before {
  content: ""; display: inline-block; width: .7em; height: .7em; margin-right: .3em; background: currentColor;
}
details { margin-top: 24px; }
summary { cursor: pointer; font-weight: 600; }
pre { overflow-x: auto; font-size: .85rem; margin: 8px 0 0; }
.wide img { max-width: 460px; }
@media (max-width: 480px) {
  table { font-size: .85rem; }
  th, td { padding-left: 8px; }
}
"""


@dataclass(frozen=True)
class Picture:
    """PNGs with words around them; `caption` is HTML. Several PNGs are parts of one picture."""

    title: str
    caption: str
    pngs: list[bytes]


@dataclass(frozen=True)
class Page:
    """What stands on the page, from top to bottom."""

    run: Run
    warning: str | None
    verdict: list[str]
    bars: Picture | None
    curves: list[Picture]
    patches: list[Picture]


def render(page: Page) -> str:
    """The whole page as HTML, with nothing outside it: no script, no font, no address."""
    run = page.run
    name = escape(run.summary.name)
    parts = [f"<h1>{name}</h1>", f'<p class="muted">{escape(_subtitle(run))}</p>']
    if page.warning is not None:
        parts.append(f'<p class="warning"><b>Warning:</b> {escape(page.warning)}</p>')
    parts.append(f'<p class="verdict">{escape(page.verdict[0])}</p>')
    parts += [f"<p>{escape(sentence)}</p>" for sentence in page.verdict[1:]]
    if run.summary.probe_note:
        parts.append(f'<p class="muted">{escape(run.summary.probe_note)}</p>')
    parts.append(_tiles(run))
    if run.summary.probes:
        bars = "" if page.bars is None else _figure(page.bars)
        table = f'<div class="table"><h3>All numbers</h3>{_table(run.summary.probes)}</div>'
        parts.append(f'<h2>What the encoder learned</h2><div class="wide">{bars}{table}</div>')
    if page.curves:
        parts.append(
            f'<h2>How training went</h2><div class="curves">{"".join(map(_figure, page.curves))}</div>'
        )
    if page.patches:
        parts.append(f"<h2>What it sees</h2>{''.join(map(_figure, page.patches))}")
    if run.notes:
        items = "".join(f"<li>{escape(note)}</li>" for note in run.notes)
        parts.append(f"<h2>What is missing</h2><ul>{items}</ul>")
    if run.config:
        parts.append(f"<details><summary>Configuration</summary><pre>{escape(run.config)}</pre></details>")
    body = "\n".join(parts)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{name}</title><style>{_CSS}</style></head>\n<body><main>\n{body}\n</main></body></html>\n"
    )


def _subtitle(run: Run) -> str:
    summary = run.summary
    parts = [summary.objective.upper()]
    if summary.steps is not None:
        parts.append(f"{summary.steps:,} steps")
    elif run.metrics:
        parts.append(f"at step {run.metrics[-1]['step']:,.0f}")
    if summary.images is not None:
        parts.append(f"{summary.images:,} images")
    parts += [summary.precision, summary.device]
    parts += [f"{package} {version}" for package, version in summary.versions.items()]
    return " · ".join(part for part in parts if part)


def _tiles(run: Run) -> str:
    """The numbers to remember, as far as there are any."""
    summary, trained = run.summary, trained_probe(run.summary)
    tiles: list[tuple[str, str]] = []
    if trained is not None and trained.linear_top1 is not None:
        tiles.append((percent(trained.linear_top1), "linear probe"))
    if trained is not None and trained.knn_top1 is not None:
        tiles.append((percent(trained.knn_top1), "kNN"))
    if summary.train_s:
        tiles.append((_duration(summary.train_s), "training time"))
        if summary.images is not None:
            tiles.append((f"{summary.images / summary.train_s:,.0f}", "images / s, whole run"))
    if (wait := _mean(run, "data_wait_fraction")) is not None:
        tiles.append((percent(wait), "of the time waiting for data"))
    if (tokens := _mean(run, "context_tokens")) is not None:
        tiles.append((f"{tokens:.1f}", "context tokens per image"))
    return (
        '<div class="tiles">'
        + "".join(f"<div><b>{n}</b><span>{words}</span></div>" for n, words in tiles)
        + "</div>"
    )


def _mean(run: Run, key: str) -> float | None:
    values = [row[key] for row in run.metrics if math.isfinite(row.get(key, math.nan))]
    return sum(values) / len(values) if values else None


def _table(probes: tuple[Probe, ...]) -> str:
    names = ("features", "linear", "kNN", "RankMe", "token std")
    rows = ["<tr>" + "".join(f"<th>{name}</th>" for name in names) + "</tr>"]
    for probe in probes:
        cells = [
            escape(probe.name),
            "–" if probe.linear_top1 is None else percent(probe.linear_top1),
            "–" if probe.knn_top1 is None else percent(probe.knn_top1),
            "–" if probe.rankme is None else f"{probe.rankme:.1f}",
            "–" if probe.target_std is None else f"{probe.target_std:.2f}",
        ]
        kind = "trained" if probe.name in TRAINED else "baseline"
        rows.append(f'<tr class="{kind}">' + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>")
    return f"<table>{''.join(rows)}</table>"


def _figure(picture: Picture) -> str:
    images = "".join(
        f'<img alt="{escape(picture.title)}" src="data:image/png;base64,{base64.b64encode(png).decode()}">'
        for png in picture.pngs
    )
    return (
        f"<figure><figcaption><h3>{escape(picture.title)}</h3><p>{picture.caption}</p></figcaption>"
        f'<div class="pngs">{images}</div></figure>'
    )


def _duration(seconds: float) -> str:
    minutes, hours = seconds / 60, seconds / 3600
    if minutes < 2:
        return f"{seconds:.0f} s"
    return f"{minutes:.0f} min" if hours < 2 else f"{hours:.1f} h"
