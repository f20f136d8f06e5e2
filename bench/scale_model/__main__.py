"""Predicts steps on many GPUs, and writes tables, numbers and a picture."""

import argparse
import sys
import textwrap
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import get_args

from bench.scale_model import picture, report
from bench.scale_model.measured import RESULTS, ROOT, ROW, load
from bench.scale_model.networks import named_network, published_masks
from bench.scale_model.predict import Base, Options, base_of, predict
from bench.scale_model.report import Scaling
from bench.scale_model.traffic import Cluster, Ring
from fastjepa.planning.memory import DEFAULT, STAGES, Split, memory_of
from fastjepa.planning.tokens import Tokens, most_seen_in

# Size, pixels of a patch, and images of a GPU for weak scaling: those measured, half of huge's for giant.
NETWORKS = (("base", 16, 128), ("large", 16, 128), ("huge", 14, 64), ("giant", 16, 32))
GPUS = tuple(8 << i for i in range(10))  # to 4,096


def main(arguments: Sequence[str] | None = None) -> int:
    asked = _parser().parse_args(arguments)
    cluster = Cluster(
        gpus_per_node=asked.gpus_per_node,
        node_bytes_per_s=asked.node_gb_per_s * 1e9,
        network_bytes_per_s=asked.network_gb_per_s * 1e9,
        node_latency_s=asked.node_latency_us * 1e-6,
        network_latency_s=asked.network_latency_us * 1e-6,
        ring=asked.ring,
    )
    launch_s = None if asked.launch_us is None else asked.launch_us * 1e-6
    options = Options(cluster, launch_s=launch_s, checkpointed=asked.checkpoint_blocks, usable=asked.usable)
    measured = load(asked.measured, asked.row)
    scalings = []
    for name, patch_size, batch in NETWORKS:
        base = base_of(named_network(name, patch_size), measured)
        strong = [(gpus, asked.global_batch // gpus) for gpus in GPUS if asked.global_batch % gpus == 0]
        scalings.append(_scaling(base, "strong", asked.global_batch, strong, options))
        scalings.append(_scaling(base, "weak", batch, [(gpus, batch) for gpus in GPUS], options))

    launched = sorted({each.launch_s for each in measured.values()} if launch_s is None else {launch_s})
    launch_us = " to ".join(dict.fromkeys(f"{each * 1e6:.0f}" for each in (launched[0], launched[-1])))
    checks = {
        each.base.network.title: _peak_over_measured(each.base) for each in scalings if each.base.is_own
    }
    page = report.page(scalings, options, launch_us, checks)
    caption = (
        f"Predicted for ZeRO {DEFAULT}, not run. {report.assumptions(options, launch_us)} Solid: CUDA "
        "graphs; dashed: every kernel launched by the host. Hollow: fewer than 8 images on a GPU. ViT-g "
        "was measured on no GPU."
    )
    asked.out.mkdir(parents=True, exist_ok=True)
    asked.picture.parent.mkdir(parents=True, exist_ok=True)
    tables, numbers = asked.out / "scale_model.md", asked.out / "scale_model.json"
    tables.write_text(page, encoding="utf-8")
    numbers.write_text(report.as_json(scalings, options, checks), encoding="utf-8")
    asked.picture.write_bytes(picture.chart(scalings, textwrap.fill(caption, 150)))
    print(page)
    for file in (tables, numbers, asked.picture):
        print(f"Wrote {file}")
    return 0


def _scaling(
    base: Base, kind: str, batch: int, pairs: Sequence[tuple[int, int]], options: Options
) -> Scaling:
    device = replace(options, launch_s=0.0)
    runs = [
        [predict(base, stage, gpus, images, each) for gpus, images in pairs for stage in STAGES]
        for each in (device, options, replace(device, schedule="bucketed"))
    ]
    return Scaling(base, kind, batch, *runs)


def _peak_over_measured(base: Base) -> float:
    """At the measured batch, of the largest masks that are sampled."""
    images = base.measured.batch
    tokens = Tokens(images, most_seen_in(published_masks(base.network), images))
    return memory_of(base.network, Split(0, 1, 0), tokens, checkpointed=False).peak / base.measured.peak_bytes


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("python -m bench.scale_model", description=__doc__)
    cluster, options = Cluster(), Options()
    add = parser.add_argument
    add("--node-gb-per-s", type=float, default=cluster.node_bytes_per_s / 1e9, help="of a GPU in its node")
    add(
        "--network-gb-per-s", type=float, default=cluster.network_bytes_per_s / 1e9, help="of a GPU out of it"
    )
    add("--node-latency-us", type=float, default=cluster.node_latency_s * 1e6, help="of a hop in a node")
    add(
        "--network-latency-us",
        type=float,
        default=cluster.network_latency_s * 1e6,
        help="of one between nodes",
    )
    add("--gpus-per-node", type=int, default=cluster.gpus_per_node)
    add("--ring", choices=get_args(Ring), default=cluster.ring)
    add(
        "--launch-us", type=float, help="of the host for each kernel (default: as measured for the reference)"
    )
    add("--global-batch", type=int, default=2048, help="of strong scaling")
    add("--checkpoint-blocks", action="store_true", help="as speed.checkpoint_blocks")
    add("--usable", type=float, default=options.usable, help="share of a GPU's memory that a step may take")
    add("--measured", type=Path, default=RESULTS, help="folder with throughput-*.json of one GPU")
    add("--row", default=ROW, help="of its tables")
    add("--out", type=Path, default=ROOT / "bench" / "results" / "scale_model")
    add("--picture", type=Path, default=ROOT / "docs" / "images" / "scale.png")
    for action in parser._actions:
        if action.default is not None and action.help and action.dest != "help":
            action.help += " (default: %(default)s)"
    return parser


if __name__ == "__main__":
    sys.exit(main())
