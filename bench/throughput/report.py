"""The table, the page, the file and the picture of a comparison."""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import torch

from bench.kernels.table import aligned, time_of
from bench.throughput.entries import IJEPA, MAE, entries
from bench.throughput.race import Contestant, Race
from bench.throughput.setting import Seen, Setting, population
from fastjepa.models.flops import executed
from fastjepa_kernels.choice import table_name

COLUMNS = (
    "row",
    "images/s",
    "spread",
    "× reference MAE",
    "× published I-JEPA",
    "context tokens",
    "useful GFLOP/image",
    "TFLOP/s",
    "MFU",
    "peak GB",
    "kernels",
    "launches",
    "host",
    "device busy",
)


_MOST_OF_A_STEP = 0.9


@dataclass(frozen=True)
class Row:
    """A row of the table; what is None was not measured.

    Attributes:
        masks: the mode, or "mae".
        seconds: of a step, a value for each round.
        steps: of a round.
        flop: useful, of a step, the mean of those of each round.
        images_per_s: the median of the rounds, and between which values half of them lie.
        over_mae, over_ijepa: the median of the ratios round by round to the reference MAE and to the
            published I-JEPA, on the same images and, of I-JEPA, masks.
        context_tokens: the mean of an image.
        useful_flop: of an image, with full blocks, backward as twice forward.
        executed_flop: of an image, with full blocks, as counted.
        flop_per_s: useful, the median of the rounds.
        mfu: of the matrix product timed in the same rounds.
        host_s: of a step handed to an idle device; waiting included where a step waits.
        busy_s: of a step, in which the device runs at least one kernel.
        how: whether it stayed in memory.
        red: why it has no time.
    """

    name: str
    group: str
    masks: str
    batch: int
    seconds: list[float]
    steps: int | None
    flop: list[float]
    images_per_s: float | None
    images_per_s_quartiles: tuple[float, float] | None
    over_mae: float | None
    over_ijepa: float | None
    context_tokens: float
    useful_flop: float
    executed_flop: float
    flop_per_s: float | None
    mfu: float | None
    held_bytes: int | None
    peak_bytes: int | None
    kernels: int | None
    launches: int | None
    host_s: float | None
    busy_s: float | None
    built_s: float
    how: str
    red: str


def ratio(over: Sequence[float], under: Sequence[float]) -> float | None:
    """How many times as fast as `over`: the median of the rounds that both have."""
    pairs = list(zip(over, under, strict=False))
    return median(a / b for a, b in pairs) if pairs else None


def quartiles(values: Sequence[float]) -> tuple[float, float]:
    if len(values) < 2:
        return values[0], values[0]
    first, _, third = quantiles(values, n=4, method="inclusive")
    return first, third


def rows_of(race: Race) -> list[Row]:
    laps = {one.entry.name: one.laps for one in race.contestants if not one.red}
    return [_row(race, one, laps.get(MAE, []), laps.get(IJEPA, [])) for one in race.contestants]


def _row(race: Race, one: Contestant, mae: list[float], ijepa: list[float]) -> Row:
    inputs, batch, entry = race.inputs, race.inputs.setting.batch, one.entry
    timed = bool(one.laps) and not one.red
    speeds = [batch / lap for lap in one.laps] if timed else []
    useful = inputs.useful_flop(entry.masks)
    counted = [executed(parts) for parts in inputs.parts(entry.masks)]
    work = [inputs.step_flop(entry.masks, numbers) for numbers in one.ran] if timed else []
    flop_per_s = median(flop / lap for flop, lap in zip(work, one.laps, strict=True)) if timed else None
    red = one.red or ("" if timed else "no time was left")
    return Row(
        name=entry.name,
        group=entry.group,
        masks=entry.masks,
        batch=batch,
        seconds=one.laps if timed else [],
        steps=len(one.ran[0]) if timed else None,
        flop=work,
        images_per_s=median(speeds) if timed else None,
        images_per_s_quartiles=quartiles(speeds) if timed else None,
        over_mae=ratio(mae, one.laps) if timed else None,
        over_ijepa=ratio(ijepa, one.laps) if timed else None,
        context_tokens=inputs.context_tokens(entry.masks),
        useful_flop=useful,
        executed_flop=sum(counted) / len(counted) / batch,
        flop_per_s=flop_per_s,
        mfu=flop_per_s / race.gauge.flop_per_s if flop_per_s and race.gauge.gemm_s else None,
        held_bytes=one.held_bytes,
        peak_bytes=one.peak_bytes,
        kernels=one.kernels,
        launches=one.launches,
        host_s=median(one.host) if timed and one.host else None,
        busy_s=one.busy_s,
        built_s=one.built_s,
        how="stayed in memory" if one.stays else "built twice, half of the rounds each time",
        red=red,
    )


def cells(row: Mapping[str, Any]) -> list[str]:
    """A line of the table, from a row as it is in the file."""
    if row["images_per_s"] is None:
        why = f": {row['red']}" if row["red"] else ""
        return [row["name"], f"not measured{why}", *[""] * (len(COLUMNS) - 2)]

    def number(value: float | None, form: str, scale: float = 1.0) -> str:
        return "–" if value is None else f"{value / scale:{form}}"

    low, high = row["images_per_s_quartiles"]
    marks = (" *" if row["how"] != "stayed in memory" else "") + (" †" if waits_for_host(row) else "")
    return [
        row["name"] + marks,
        f"{row['images_per_s']:.4g}",
        f"{low:.4g}–{high:.4g}",
        number(row["over_mae"], ".2f"),
        number(row["over_ijepa"], ".2f"),
        f"{row['context_tokens']:.1f}",
        number(row["useful_flop"], ".4g", 1e9),
        number(row["flop_per_s"], ".3g", 1e12),
        number(row["mfu"], ".1%"),
        number(most_bytes(row), ".3g", 1e9),
        number(row["kernels"], ".0f"),
        number(row["launches"], ".0f"),
        "–" if row["host_s"] is None else time_of(row["host_s"]),
        "–" if row.get("busy_s") is None else time_of(row["busy_s"]),
    ]


def most_bytes(row: Mapping[str, Any]) -> int | None:
    """Of memory that nothing else can have: a graph's own is held between steps, in no tensor's peak."""
    known = [row[key] for key in ("peak_bytes", "held_bytes") if row.get(key) is not None]
    return max(known, default=None)


def waits_for_host(row: Mapping[str, Any]) -> bool:
    """Whether the host takes most of a step on a GPU, and the device, where that is known, does not."""
    if row.get("held_bytes") is None or row["host_s"] is None or not row["seconds"]:
        return False
    most, busy_s = _MOST_OF_A_STEP * median(row["seconds"]), row.get("busy_s")
    return bool(row["host_s"] > most and (busy_s is None or busy_s <= most))


def complete(rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """With those that were left out, which say that they are not measured."""
    found = {row["name"]: row for row in rows}
    names = dict.fromkeys([*(entry.name for entry in entries()), *found])
    return [found.get(name, {"name": name, "images_per_s": None, "red": ""}) for name in names]


def masks_note(size: Mapping[str, Any]) -> str:
    """How the masks of these rows compare with many, in context tokens and work of an image."""
    measured = [row for row in size["rows"] if row["images_per_s"]]
    modes = dict.fromkeys(row["masks"] for row in measured if row["masks"] != "mae")  # which never change
    if "draws" in size:
        steps = "/".join(str(n) for n in sorted({row["steps"] for row in measured}))
        said = [f"{size['draws']} batches of masks, {steps} steps of a row in a round"]
        many = size["pool"]["masks"]
    else:
        said = [
            "How many batches of masks these are was not recorded, and TFLOP/s are by the mean of all of them"
        ]
        many = {mode: _many(size, mode) for mode in modes}
    for mode in modes:
        if mode not in many:
            continue
        row = next(row for row in measured if row["masks"] == mode)
        pairs = (
            (row["context_tokens"], many[mode]["context_tokens"], 1.0, ""),
            (row["useful_flop"], many[mode]["useful_flop"], 1e9, " GFLOP/image"),
        )
        tokens, flop = (
            f"{here / unit:.4g}; of many: {all_ / unit:.4g}{name}" for here, all_, unit, name in pairs
        )
        said.append(f"{mode}: context tokens of these draws: {tokens}; useful work: {flop}")
    return ". ".join(said) + "."


def _many(size: Mapping[str, Any], mode: Seen) -> dict[str, float]:
    """By the sampler, for a file that does not say it."""
    setting = Setting(
        size["size"], size["batch"], torch.device("cpu"), size["precision"], size["mae_precision"]
    )
    return population(setting, mode).means(size["batch"])


def markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    return aligned([COLUMNS, *(cells(row) for row in rows)], names={0})


def size_of(race: Race, seconds: float) -> dict[str, Any]:
    """What the file says of one size."""
    setting, shape = race.inputs.setting, race.inputs.setting.shape()
    return {
        "size": setting.size,
        "patch_size": shape.patch_size,
        "image_size": shape.image_size[0],
        "batch": setting.batch,
        "precision": setting.precision,
        "mae_precision": setting.mae_precision,
        "rounds": race.rounds,
        "draws": setting.draws,
        "pool": {"steps": setting.pool, "masks": _populations(race)},
        "gemm_flop_per_s": race.gauge.flop_per_s if race.gauge.gemm_s else None,
        "copy_bytes_per_s": race.gauge.bytes_per_s if race.gauge.copy_s else None,
        "took_s": round(seconds),
        "rows": [asdict(row) for row in rows_of(race)],
    }


def _populations(race: Race) -> dict[str, dict[str, float]]:
    kinds = dict.fromkeys(one.entry.masks for one in race.contestants if one.laps and not one.red)
    return {kind: race.inputs.population(kind).means(race.inputs.setting.batch) for kind in kinds}


def heading(size: Mapping[str, Any]) -> str:
    gemm, copied = size["gemm_flop_per_s"], size["copy_bytes_per_s"]
    rates = f"; GEMM {gemm / 1e12:.3g} TFLOP/s, copy {copied / 1e9:.0f} GB/s" if gemm and copied else ""
    return (
        f"ViT {size['size']}, patches of {size['patch_size']} in {size['image_size']} px, "
        f"batch {size['batch']}, {size['precision']} (reference MAE {size['mae_precision']}), "
        f"{size['rounds']} rounds{rates}"
    )


NOTES = """\
All rows of a size ran in one process, in turn, in another order in each round; medians of the rounds, with
the quartiles as their spread. Whole optimizer steps on images that are already on the device, the same in
all rows: uint8 for fastjepa, and the same as normalised fp32, four times the bytes, for the references,
made beforehand. Masks were drawn beforehand; their shapes change from step to step in `truncate` and
`packed`, and every shape had been seen before time was taken. Where the number of batches of masks stands,
they were chosen of many so that their mean work is that of many. Useful work counts full blocks and backward
as twice forward, MFU is its share of the matrix product timed in the same rounds. Peak GB is of tensors in a
step or of what is held between steps, graphs' own memory included, whichever is more. Kernels are those of a
step, launches what the host hands over for them, host what it takes for a step on an idle device, with its
waits, device busy the time in which at least one kernel runs. On a CPU, kernels are ops of torch, and the
peak is what a step adds. Rows with * did not fit into memory beside the others: built twice and timed for
half of the rounds each time. A row with † waits for its host, which takes more than 90 % of the step while
the device is busy for less than that or, where no busy time was recorded, for an unknown part of it."""


def page(facts: Mapping[str, Any], sizes: Sequence[Mapping[str, Any]], chart: str | None) -> str:
    lines = [f"# Throughput on {facts['device']}", ""]
    lines += [f"- {name}: {value}" for name, value in facts.items() if name != "device"]
    lines += ["", NOTES, ""]
    for size in sizes:
        lines += [f"## {heading(size)}", "", masks_note(size), "", markdown(size["rows"]), ""]
    return "\n".join([*lines, *([f"![Images per second]({chart})", ""] if chart else [])])


def save(
    folder: Path, facts: Mapping[str, Any], sizes: Sequence[Mapping[str, Any]], finished: bool = False
) -> Path:
    """Write <folder>/<device>/throughput-<date>.json and .md, when finished the .png too; the JSON's path."""
    path = folder / table_name(facts["device"]).removesuffix(".json") / f"throughput-{facts['date']}.json"
    write(path, json.dumps({**facts, "sizes": list(sizes)}, indent=1, ensure_ascii=False) + "\n")
    picture = None
    if finished and any(row["images_per_s"] for size in sizes for row in size["rows"]):
        picture = path.with_suffix(".png")
        picture.write_bytes(chart(sizes))
    write(path.with_suffix(".md"), page(facts, sizes, picture.name if picture else None))
    return path


def write(path: Path, text: str) -> None:
    """Whole or not at all, whatever ends the process."""
    path.parent.mkdir(parents=True, exist_ok=True)
    half = path.with_name(path.name + ".half")
    half.write_text(text, encoding="utf-8")
    os.replace(half, path)


def chart(sizes: Sequence[Mapping[str, Any]]) -> bytes:
    """A PNG with a bar for each row that was timed, a panel for each size."""
    from matplotlib.figure import Figure

    from fastjepa.report.figures import BLUE, INK, LIGHT_BLUE, MUTED, to_png

    panels = [
        (size, timed) for size in sizes if (timed := [row for row in size["rows"] if row["images_per_s"]])
    ]
    heights = [len(timed) + 1.5 for _, timed in panels]
    figure = Figure(figsize=(6.4, 0.24 * sum(heights) + 0.4), layout="constrained")
    axes = figure.subplots(len(panels), 1, squeeze=False, gridspec_kw={"height_ratios": heights})[:, 0]
    for (size, timed), axis in zip(panels, axes, strict=True):
        names, speeds = [row["name"] for row in timed], [row["images_per_s"] for row in timed]
        colours = [
            BLUE
            if row["group"] == "main" and "fastjepa" in row["name"]
            else LIGHT_BLUE
            if row["group"] == "switch"
            else MUTED
            for row in timed
        ]
        spread = [row["images_per_s_quartiles"] for row in timed]
        errors = [
            [max(0.0, speed - low) for speed, (low, _) in zip(speeds, spread, strict=True)],
            [max(0.0, high - speed) for speed, (_, high) in zip(speeds, spread, strict=True)],
        ]
        axis.barh(names, speeds, xerr=errors, color=colours, ecolor=INK, error_kw={"linewidth": 0.8})
        for place, speed in enumerate(speeds):
            axis.text(0, place, f" {speed:.4g}", va="center", fontsize=6, color="white")
        axis.invert_yaxis()
        axis.tick_params(labelsize=6)
        axis.set_title(f"ViT {size['size']}/{size['patch_size']}, images/s", fontsize=7, loc="left")
        axis.spines[["top", "right"]].set_visible(False)
    return to_png(figure)
