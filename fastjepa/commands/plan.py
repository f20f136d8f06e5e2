"""`fastjepa plan`: what a run would take, before it is begun."""

import argparse
import json
import math
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from fastjepa.commands.refusal import count, refuse

if TYPE_CHECKING:
    from fastjepa.config import Config

IMAGENET = 1_281_167  # images of ImageNet-1k
MOST = 1e15  # bytes of a GPU; what is more is a slip of the keyboard, and its sums may overflow
UNITS = {"MB": 1e6, "GB": 1e9, "TB": 1e12, "MIB": 2.0**20, "GIB": 2.0**30, "TIB": 2.0**40}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run from the command line; the exit status."""
    from fastjepa.config import ConfigError, load_config
    from fastjepa.data.shards.store import StoreError
    from fastjepa.data.unreadable import TooManyUnreadable
    from fastjepa.planning.plan import Device, make_plan
    from fastjepa.planning.say import as_dict, say
    from fastjepa.planning.work import IMAGES_PER_CORE_SECOND, PEAKS

    options = _parser().parse_intermixed_args(arguments)
    try:
        config = load_config(options.config, options.overrides, needs_data=options.measure_loader)
        images, per_core = options.images, options.images_per_core
        if options.measure_loader or (images is None and _is_at_hand(config)):
            from fastjepa.engine.images import open_images
            from fastjepa.planning.loading import images_per_core_second

            found = open_images(config)
            images = images or len(found.train)
            if options.measure_loader:
                per_core = images_per_core_second(config, found)
        flop_per_s = options.tflops * 1e12 if options.tflops else PEAKS[options.device]
        device = Device(options.memory, flop_per_s, options.mfu, options.usable)
        plan = make_plan(config, options.gpus, device, images or IMAGENET, per_core or IMAGES_PER_CORE_SECOND)
    except (ConfigError, StoreError, TooManyUnreadable) as error:
        return refuse(error)
    if options.json:
        print(json.dumps(as_dict(plan), indent=1))
        return 0
    print(say(plan))
    core = per_core or IMAGES_PER_CORE_SECOND
    whose = "measured here" if options.measure_loader else "given" if per_core else "of docs/data.md"
    of_whom = "" if images else " as ImageNet-1k has"
    print(
        f"Assumed: {images or IMAGENET:,} images an epoch{of_whom}; {core:,.0f} images/s of a core ({whose})"
    )
    return 0


def _is_at_hand(config: "Config") -> bool:
    return config.data.name == "fashion_mnist" or config.data.root is not None


def _parser() -> argparse.ArgumentParser:
    from fastjepa.planning.plan import USABLE
    from fastjepa.planning.work import IMAGES_PER_CORE_SECOND, MFU, PEAKS

    parser = argparse.ArgumentParser(
        "fastjepa plan",
        description="Predict what a run would take: memory by part, the batch that fits, GFLOP of an image, "
        "hours, and what has to be loaded. Nothing is run, and no GPU is needed.",
    )
    add = parser.add_argument
    add("--config", metavar="FILE", help="as train takes it")
    add("overrides", nargs="*", metavar="section.key=value")
    add("--gpus", type=count, default=1, metavar="N", help="all alike (default: %(default)s)")
    add("--memory", type=memory, required=True, metavar="SIZE", help="of one of them, as 80GB or 80GiB")
    add(
        "--usable",
        type=_share,
        default=USABLE,
        metavar="SHARE",
        help="of it for tensors (default: %(default)s)",
    )
    add("--device", choices=PEAKS, default="h100", help="whose peak is meant (default: %(default)s)")
    add("--tflops", type=_above_0, metavar="N", help="dense bf16 peak of another device")
    add(
        "--mfu", type=_share, default=MFU, metavar="SHARE", help="of that peak, useful (default: %(default)s)"
    )
    add("--images", type=count, metavar="N", help=f"of an epoch; default: data.root's, else {IMAGENET:,}")
    loader = parser.add_mutually_exclusive_group()
    loader.add_argument(
        "--images-per-core",
        type=_above_0,
        metavar="N",
        help=f"that one core loads in a second (default: {IMAGES_PER_CORE_SECOND:g}, as in docs/data.md)",
    )
    loader.add_argument("--measure-loader", action="store_true", help="time one core on data.root for that")
    add("--json", action="store_true", help="print it for other programs, in bytes and FLOPs")
    return parser


def memory(text: str) -> float:
    """An argument such as 80GB or 79.6GiB, in bytes."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?) ?([MGT]i?B)", text, re.IGNORECASE)
    size = float(found[1]) * UNITS[found[2].upper()] if found else 0.0
    if not 0 < size <= MOST:
        what = "must be a number and its unit, MB, GB, TB, MiB, GiB or TiB, as 24GB, and at most 1000TB"
        raise argparse.ArgumentTypeError(f"{what}, got {text!r}")
    return size


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan


def _above_0(text: str) -> float:
    if not 1e-6 <= _number(text) <= 1e9:
        raise argparse.ArgumentTypeError(f"must be a number above 0, of 1e-6 to 1e9, got {text!r}")
    return float(text)


def _share(text: str) -> float:
    if not 0 < _number(text) <= 1:
        raise argparse.ArgumentTypeError(f"must be above 0 and at most 1, got {text!r}")
    return float(text)
