"""How fast I-JEPA and MAE come to an accuracy, and what detail that nobody can predict costs them.

    python -m bench.accuracy                     # everything, as long as it takes
    python -m bench.accuracy --limit-s 100       # no new runs after so long; the same command goes on later
    python -m bench.accuracy --report            # the page and the figures from what there is
    python -m bench.accuracy --report FOLDER     # of a folder from another machine

The same encoder, images and seconds of training for both objectives. It goes through clean images first, then
strength by strength through the kinds of detail, and keeps each result as soon as it is there.
"""

import argparse
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from bench.accuracy import report
from bench.accuracy.corruptions import KINDS
from bench.accuracy.plan import TRAINED, conditions
from bench.accuracy.run import Asked, Experiment, Say
from bench.accuracy.store import OtherSettings, Store
from bench.kernels import machine
from bench.kernels.results import RESULTS
from fastjepa.config import ConfigError, load_config
from fastjepa_kernels.choice import table_name

CONFIGS = machine.ROOT / "configs"
QUICK_STEPS, QUICK_IMAGES = 16, 100
QUICK_MODEL = ("model.depth=1", "model.width=32", "model.heads=2", "optim.global_batch=8")


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.accuracy", description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    length = parser.add_mutually_exclusive_group()
    length.add_argument(
        "--seconds", type=float, help="of training in a run (default: 5 on CUDA, 120 on a CPU)"
    )
    length.add_argument("--steps", type=int, help="of a run, the same for both objectives, instead")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--kinds", nargs="*", choices=KINDS, default=list(KINDS))
    parser.add_argument(
        "--strengths", type=float, nargs="+", default=[1.0, 0.5, 0.25], help="0 to 1, most telling first"
    )
    parser.add_argument("--bank", type=int, default=4000, help="training images that probes learn from")
    parser.add_argument("--queries", type=int, default=4000, help="test images that they are judged on")
    parser.add_argument("--set", nargs="*", default=[], metavar="SECTION.KEY=VALUE", help="in both recipes")
    for objective, file in zip(TRAINED, ("fashion_mnist.yaml", "fashion_mnist_mae.yaml"), strict=True):
        parser.add_argument(f"--{objective}", type=Path, default=CONFIGS / file, metavar="RECIPE")
    parser.add_argument("--jobs", type=int, help="processes for masks and probes (default: cores but two)")
    parser.add_argument(
        "--side-by-side", type=int, help="runs trained at once (default: 6 on CUDA, 1 on a CPU)"
    )
    parser.add_argument("--limit-s", type=float, default=float("inf"), help="start no new runs after so long")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the results")
    parser.add_argument(
        "--report",
        type=Path,
        nargs="?",
        const=Path(),
        metavar="FOLDER",
        help="only write the page of what is there",
    )
    parser.add_argument("--quick", action="store_true", help="a few steps, images and runs: does it work?")
    options = parser.parse_args(arguments)
    if options.quick:
        options.steps, options.seconds = options.steps or QUICK_STEPS, None
        options.bank, options.queries = QUICK_IMAGES, QUICK_IMAGES
        options.seeds, options.kinds, options.strengths = (
            part[:1] for part in (options.seeds, options.kinds, options.strengths)
        )
        options.set = [*QUICK_MODEL, *options.set]
    if not all(0 < strength <= 1 for strength in options.strengths):
        parser.error("--strengths lie above 0, which is the clean images, and are at most 1")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    start_s = time.monotonic()
    options = parse(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        print("error: --device cuda, but torch sees no CUDA device here; use auto or cpu", file=sys.stderr)
        return 2
    on_cuda = options.device != "cpu" and torch.cuda.is_available()
    device = torch.device("cuda", torch.cuda.current_device()) if on_cuda else torch.device("cpu")
    if on_cuda:  # bf16 would add a kernel for each cast, and launches are what small models wait for
        torch.set_float32_matmul_precision("high")
    facts = machine.facts(device)
    facts["precision"] = "fp32, matrices in TF32" if on_cuda else "fp32"
    store = Store(options.results / table_name(facts["device"]).removesuffix(".json") / "accuracy")
    if options.report is not None:
        store = Store(options.report) if options.report.name else store
    else:
        try:
            configs = {name: load_config(getattr(options, name), options.set) for name in TRAINED}
            seconds = options.seconds or (None if options.steps else 5.0 if on_cuda else 120.0)
            asked = Asked(configs, seconds, options.steps, options.bank, options.queries)
            measured = store.open(asked.as_dict())
        except (ConfigError, OtherSettings) as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
        say = _say_since(start_s)
        jobs = options.jobs or max(1, (os.cpu_count() or 1) - 2)
        experiment = Experiment(asked, store, device, jobs, say)
        try:
            if measured is None:
                store.begin(asked.as_dict(), experiment.prepare(None, 0.2 if options.quick else 1.0), facts)
            else:
                experiment.prepare(measured)
            for condition in conditions(options.kinds, options.strengths):
                if time.monotonic() - start_s > options.limit_s:
                    say(f"{options.limit_s:g} s are over: {condition} and what follows is left for later")
                    break
                experiment.run(condition, options.seeds, options.side_by_side or (6 if on_cuda else 1))
            experiment.collect(wait=True)
        finally:
            experiment.close()
    for path in report.write(store):
        print(path)
    print((store.folder / "accuracy.md").read_text(encoding="utf-8"))
    return 0


def _say_since(start_s: float) -> Say:
    return lambda line: print(f"[{time.monotonic() - start_s:6.1f} s] {line}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
