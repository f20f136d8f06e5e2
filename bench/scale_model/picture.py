"""Images per second and efficiency against GPUs."""

from collections.abc import Callable, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, PercentFormatter

from bench.scale_model.predict import Prediction
from bench.scale_model.report import SMALL, Scaling, find, gpu_counts
from fastjepa.planning.memory import DEFAULT
from fastjepa.report.figures import FAINT, INK, MUTED, to_png

COLOURS = ("#17669b", "#b8432f", "#2f8f5b", "#8a5a9e")


def chart(scalings: Sequence[Scaling], caption: str) -> bytes:
    """A PNG: above images/s, below efficiency; on the left strong, on the right weak scaling."""
    figure = Figure(figsize=(7.4, 6.2))
    panels = figure.subplots(2, 2, sharex=True, squeeze=False)
    figure.subplots_adjust(left=0.1, right=0.985, top=0.95, bottom=0.255, hspace=0.12, wspace=0.2)
    for column, kind in enumerate(("strong", "weak")):
        of_kind = [each for each in scalings if each.kind == kind]
        speed, efficiency = panels[0][column], panels[1][column]
        for scaling, colour in zip(of_kind, COLOURS, strict=True):
            _line(speed, scaling, colour, lambda each: each.images_per_s)
            _line(efficiency, scaling, colour, lambda each: each.efficiency)
        batch = of_kind[0].batch
        speed.set_title(
            f"Strong scaling, global batch {batch:,}" if kind == "strong" else "Weak scaling",
            fontsize=9,
            loc="left",
            color=INK,
        )
        speed.set_yscale("log")
        speed.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
        efficiency.set_ylim(0, 1.1)
        efficiency.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        efficiency.set_xscale("log", base=2)
        counts = gpu_counts(max(scalings, key=lambda each: len(gpu_counts(each))))
        efficiency.set_xticks(counts, [f"{count:,}" for count in counts])
        efficiency.tick_params(axis="x", rotation=45)
        efficiency.set_xlabel("GPUs", fontsize=8)
        for axes in (speed, efficiency):
            axes.tick_params(labelsize=7)
            axes.grid(color=FAINT, linewidth=0.6)
            axes.spines[["top", "right"]].set_visible(False)
        if kind == "weak":
            speed.legend(
                handles=[line for line in speed.get_lines() if not line.get_label().startswith("_")],
                fontsize=7,
                frameon=False,
                loc="lower right",
            )
    panels[0][0].set_ylabel("images/s", fontsize=8)
    panels[1][0].set_ylabel("efficiency of a GPU", fontsize=8)
    figure.text(0.02, 0.012, caption, fontsize=6.6, color=MUTED, va="bottom", wrap=True)
    return to_png(figure)


def _line(axes: Axes, scaling: Scaling, colour: str, value: Callable[[Prediction], float]) -> None:
    """Solid without the host's time, dashed with it; hollow where a GPU has few images."""
    found = [find(scaling.device, DEFAULT, gpus) for gpus in gpu_counts(scaling)]
    launched = [find(scaling.launched, DEFAULT, gpus) for gpus in gpu_counts(scaling)]
    x = [each.gpus for each in found]
    title = f"ViT-{scaling.base.network.title}"
    label = title if scaling.kind == "strong" else f"{title}, {scaling.batch} images a GPU"
    axes.plot(x, [value(each) for each in found], color=colour, linewidth=1.5, label=label)
    axes.plot(
        x,
        [value(each) for each in launched],
        color=colour,
        linewidth=1,
        linestyle=(0, (4, 3)),
        label="_launched",
    )
    for each in found:
        face = "white" if each.batch < SMALL else colour
        axes.plot(each.gpus, value(each), "o", markersize=3.5, color=colour, markerfacecolor=face, label="_")
