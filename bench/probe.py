"""Measure what a sweep of linear heads costs beside one head, and beside the features they all share.

python -m bench.probe
python -m bench.probe --device cuda --rounds 9
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from bench.kernels import machine
from bench.kernels.machine import ROOT
from bench.kernels.results import RESULTS
from bench.throughput.report import write
from fastjepa.config import load_config
from fastjepa.engine.build import build_model
from fastjepa.evaluation.features import mean_of_tokens
from fastjepa.evaluation.layers import last_blocks
from fastjepa.evaluation.sweep import HEADS, Head, Heads, SweepSettings, train_heads
from fastjepa_kernels.choice import table_name

ONE = (Head(0.1, True),)
BLOCKS = 4
BATCH = 256  # images of a forward pass
SETTINGS = SweepSettings()


@dataclass(frozen=True)
class Case:
    """Features that heads are trained on: [rows, width], `classes` labels.

    Attributes:
        recipe: in configs/, whose encoder takes them, and
        images: how many it is timed on.
    """

    name: str
    rows: int
    width: int
    classes: int
    recipe: str
    images: int


CASES = (
    Case("Fashion-MNIST recipe, last block", 9000, 128, 10, "fashion_mnist", 512),
    Case("Fashion-MNIST recipe, last 4 blocks", 9000, 512, 10, "fashion_mnist", 512),
    Case("ViT-B/16, 1,000 classes", 9000, 768, 1000, "vit_base_16", 4),
)


@dataclass(frozen=True)
class Round:
    """Seconds of one epoch over the cached features, each kind once, one after another."""

    one_s: float
    sweep_s: float
    apart_s: float  # the same heads, each in a pass of its own


def timed(do: Callable[[], object], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    before = time.perf_counter()
    do()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - before


def features_of(case: Case, device: torch.device) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(case.rows, case.width, generator=generator)
    labels = torch.randint(case.classes, (case.rows,), generator=generator)
    return features.to(device), labels.to(device)


def measure(case: Case, device: torch.device, rounds: int, epochs: int) -> list[Round]:
    """The first round warms up and is not kept."""
    features, labels = features_of(case, device)
    how = SweepSettings(epochs, SETTINGS.batch)

    def fit(heads: Sequence[Head]) -> None:
        train_heads(features, labels, case.classes, heads, how)

    def apart() -> None:
        for head in HEADS:
            fit((head,))

    found = []
    for _ in range(rounds + 1):
        one_s = timed(lambda: fit(ONE), device)
        sweep_s = timed(lambda: fit(HEADS), device)
        apart_s = timed(apart, device)
        found.append(Round(one_s / epochs, sweep_s / epochs, apart_s / epochs))
    return found[1:]


def launches(case: Case, heads: Sequence[Head], device: torch.device) -> int:
    """Kernels of one step, on a GPU; on a CPU calls of operators."""
    features, labels = features_of(case, device)
    rows = slice(SETTINGS.batch)
    trained = Heads.start(heads, case.width, case.classes, features, 0)
    trained.step(features[rows], labels[rows], 1.0)
    kinds = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device.type == "cuda")
    with profile(activities=kinds) as seen:
        trained.step(features[rows], labels[rows], 1.0)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    wanted = torch.autograd.DeviceType.CUDA if device.type == "cuda" else torch.autograd.DeviceType.CPU
    return sum(event.device_type == wanted for event in seen.events())


def seconds_per_image(case: Case, device: torch.device) -> Callable[[], float]:
    """Of features of the last blocks, by the encoder of the case's recipe."""
    overrides = ["data.root=."] if case.recipe != "fashion_mnist" else []
    encoder = build_model(load_config(ROOT / "configs" / f"{case.recipe}.yaml", overrides)).encoder.to(device)
    channels, size = encoder.shape.channels, encoder.shape.image_size
    pixels = torch.randint(256, (case.images, channels, *size), dtype=torch.uint8)

    def once() -> None:
        for some in pixels.split(BATCH):
            mean_of_tokens(last_blocks(encoder, some.to(device), BLOCKS), len(some)).cpu()

    once()
    return lambda: timed(once, device) / len(pixels)


def row(case: Case, rounds: Sequence[Round], each_s: Sequence[float], device: torch.device) -> dict[str, Any]:
    """Medians of the ratios of each round; a whole probe is the features of all rows, then every epoch."""

    def whole(epoch_s: float, image_s: float) -> float:
        return case.rows * image_s + SETTINGS.epochs * epoch_s

    return {
        "case": asdict(case),
        "heads": len(HEADS),
        "feature_ms_per_image": 1e3 * median(each_s),
        "one_ms_per_epoch": 1e3 * median(r.one_s for r in rounds),
        "sweep_ms_per_epoch": 1e3 * median(r.sweep_s for r in rounds),
        "training_alone": median(r.sweep_s / r.one_s for r in rounds),
        "apart_over_sweep": median(r.apart_s / r.sweep_s for r in rounds),
        "with_features": median(
            whole(r.sweep_s, s) / whole(r.one_s, s) for r, s in zip(rounds, each_s, strict=True)
        ),
        "launches_one": launches(case, ONE, device),
        "launches_sweep": launches(case, HEADS, device),
        "rounds": [asdict(r) for r in rounds],
    }


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.probe", description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5, help="of which the median counts")
    parser.add_argument("--epochs", type=int, default=2, help="of each timing")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    device = torch.device(options.device)
    facts = machine.facts(device) | {"load_before": os.getloadavg()[0]}
    rows = []
    for case in CASES:
        image_s = seconds_per_image(case, device)
        each_s, rounds = [], []
        for _ in range(options.rounds):
            each_s.append(image_s())
            rounds += measure(case, device, 1, options.epochs)
        rows.append(row(case, rounds, each_s, device))
    content = facts | {
        "load_after": os.getloadavg()[0],
        "epochs": SETTINGS.epochs,
        "batch": SETTINGS.batch,
        "rows": rows,
    }
    folder = options.results / table_name(facts["device"]).removesuffix(".json")
    path = folder / f"probe-{facts['date']}.json"
    write(path, json.dumps(content, indent=1) + "\n")
    print(f"{len(HEADS)} heads over one: with features / training alone; apart over together; launches")
    for found in rows:
        print(
            f"{found['case']['name']:38} {found['with_features']:.2f} / {found['training_alone']:.2f}; "
            f"{found['apart_over_sweep']:.1f}; {found['launches_one']} -> {found['launches_sweep']}"
        )
    print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
