"""The page of a folder of results: sentences, table, figures, and all numbers as JSON."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bench.accuracy import figures
from bench.accuracy.plan import TRAINED
from bench.accuracy.store import Store
from bench.accuracy.summary import LOOP, MEASURES, corrupted, curve, markdown, rows, verdict
from fastjepa.report.figures import to_png


def write(store: Store) -> list[Path]:
    """accuracy.json, accuracy.md and the PNGs, from whatever is there; the paths."""
    results, settings = store.results(), store.settings()
    said = {measure: verdict(results, measure) for measure in MEASURES}
    pictures = {
        "accuracy_seconds.png": figures.against_cost(
            results, lambda point: point.seconds, "seconds of training"
        ),
        "accuracy_flops.png": figures.against_cost(results, lambda point: point.flop, "FLOPs of training"),
        "detail.png": figures.against_strength(results),
        "detail_samples.png": figures.samples(
            sorted({s for strengths in corrupted(results).values() for s in strengths}) or [0.25, 0.5, 1.0]
        ),
    }
    store.folder.mkdir(parents=True, exist_ok=True)
    written = []
    for name, figure in pictures.items():
        if figure is not None:
            (store.folder / name).write_bytes(to_png(figure))
            written.append(store.folder / name)
    curves = {
        learner: {
            measure: [asdict(point) for point in curve(results, learner, measure)] for measure in MEASURES
        }
        for learner in TRAINED
    }
    content = settings | {"verdict": said, "rows": rows(results), "curves": curves}
    path = store.folder / "accuracy.json"
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    page = path.with_suffix(".md")
    shown = [picture.name for picture in written]
    page.write_text(
        _page(settings, said["linear_top1"], said["knn_top1"], markdown(results), shown), encoding="utf-8"
    )
    return [path, page, *written]


def _page(settings: dict[str, Any], linear: list[str], knn: list[str], table: str, shown: list[str]) -> str:
    facts, measured, asked = (settings.get(key, {}) for key in ("facts", "measured", "asked"))
    lines = [f"# Accuracy on {facts.get('device', 'an unknown device')}", ""]
    lines += [f"- {name}: {value}" for name, value in facts.items() if name != "device"]
    for name, cost in measured.items():
        batch = asked[name]["optim"]["global_batch"]
        lines.append(
            f"- {name}: {1e3 * cost['step_seconds']:.3f} ms and {cost['step_flop']:.3g} FLOPs a step "
            f"of {batch} images ({cost['how']}), {cost['steps']} steps in a run"
        )
    lines += [
        "",
        "Seconds are steps by the seconds of a step with the device to itself, probing left out: several "
        "runs are trained side by side. Bands are from the least to the most of all seeds.",
        "",
        LOOP,
        "",
        "## What it shows",
        "",
        *linear,
        "",
        "By kNN:",
        "",
        *knn,
        "",
        table,
        "",
        *(f"![{name}]({name})\n" for name in shown),
    ]
    return "\n".join(lines)
