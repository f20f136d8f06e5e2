"""`fastjepa data index|pack|stats`: make images ready for training, and look at them."""

import argparse
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from fastjepa.commands.refusal import count, refuse

UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def add_to(commands: Any) -> None:
    parser = commands.add_parser("data", help="pack images into shards, index shards, look at images")
    parser.set_defaults(do=run)
    actions = parser.add_subparsers(dest="action", required=True, metavar="action")
    _add_index(actions)
    _add_pack(actions)
    _add_stats(actions)


def _add_index(actions: Any) -> None:
    what = "write down where in which tar shard each image lies"
    index = actions.add_parser("index", help=what, description=f"{what}, so that data.name=shards finds it")
    index.add_argument(
        "shards", nargs="+", metavar="SHARDS", help="tar files, URLs of them, or one folder that holds them"
    )
    index.add_argument(
        "--out", type=Path, metavar="FILE", help="default: index.safetensors beside the shards"
    )
    index.add_argument("--no-labels", action="store_true", help="leave out .cls and .json members")
    index.add_argument("--force", action="store_true", help="replace an index that is there")


def _add_pack(actions: Any) -> None:
    what = "resize a folder of images into indexed shards"
    pack = actions.add_parser(
        "pack", help=what, description=f"{what}; again, with the same settings, goes on where it was stopped"
    )
    pack.add_argument("folder", type=Path, metavar="FOLDER", help="images; class folders become labels")
    pack.add_argument("out", type=Path, metavar="OUT", help="a folder for the shards, new or of this pack")
    pack.add_argument("--short-side", type=count, default=256, metavar="PIXELS", help="larger are reduced")
    pack.add_argument("--quality", type=_quality, default=90, metavar="Q", help="of JPEG, 1 to 100")
    pack.add_argument("--shard-size", type=size, default=size("512MB"), metavar="SIZE", help="as 512MB, 1GiB")
    pack.add_argument(
        "--workers", type=count, default=os.cpu_count() or 1, metavar="N", help="processes; default: cores"
    )
    pack.add_argument(
        "--copy-small", action="store_true", help="copy files that are small enough byte for byte"
    )
    pack.add_argument("--in-order", action="store_true", help="keep the order of the folder; not shuffled")


def _add_stats(actions: Any) -> None:
    what = "count images, their sizes and formats, and measure data.mean and data.std"
    stats = actions.add_parser("stats", help=what, description=what)
    stats.add_argument("root", metavar="DIR_OR_SHARDS", help="a folder of images, or of indexed shards")
    stats.add_argument(
        "--images", type=count, metavar="N", help="look at so many, evenly spread; default: all"
    )
    stats.add_argument("--size", type=count, default=224, metavar="PIXELS", help="of views that are measured")
    stats.add_argument(
        "--workers", type=count, default=os.cpu_count() or 1, metavar="N", help="processes; default: cores"
    )
    stats.add_argument("--json", type=Path, metavar="FILE", help="write all of it there too")
    stats.add_argument("--force", action="store_true", help="replace FILE")


def size(text: str) -> int:
    """An argument such as 512MB or 1GiB, in bytes."""
    number = text.rstrip("BIKMGbikmg")
    unit = UNITS.get(text[len(number) :].upper())
    if unit is None or not number.isdecimal() or int(number) < 1:
        raise argparse.ArgumentTypeError(
            f"must be a whole number and KB, MB, GB, KiB, MiB or GiB, got {text!r}"
        )
    return int(number) * unit


def _printable(text: str) -> str:
    """Bytes in names of files that are no UTF-8, as escapes."""
    return text.encode("utf-8", "backslashreplace").decode()


def _quality(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= 100:
        raise argparse.ArgumentTypeError(f"must be 1 to 100, got {text!r}")
    return int(text)


def run(options: argparse.Namespace) -> int:
    from fastjepa.data.workers import WorkersDied

    actions: dict[str, Callable[[argparse.Namespace], int]] = {
        "index": _index,
        "pack": _pack,
        "stats": _stats,
    }
    try:
        return actions[options.action](options)
    except (ValueError, OSError, WorkersDied, TimeoutError) as error:
        return refuse(error)


def _index(options: argparse.Namespace) -> int:
    from fastjepa.commands.bar import progress
    from fastjepa.data.shards.build import index_shards
    from fastjepa.data.shards.index import write_index

    shards = _shards(options.shards)
    file = options.out or _beside(shards)
    if file.exists() and not options.force:
        return refuse(f"{file} exists; give another name with --out, or --force to replace it")
    if not file.parent.is_dir():
        return refuse(f"there is no folder {file.parent} to write {file.name} into")
    with progress("Indexing", len(shards), "shards") as advance:
        index = index_shards(shards, not options.no_labels, lambda shard: advance(1))
    write_index(index, file)
    classes = "without labels" if index.labels is None else f"in {len(index.class_names or ())} classes"
    print(f"Wrote {file}: {len(index):,} images in {len(shards):,} shards, {classes}")
    return 0


def _shards(given: Sequence[str]) -> list[str]:
    """Files and URLs, in the order given; those of a folder by name."""
    from fastjepa.data.shards.store import filesystem, is_url

    shards: list[str] = []
    for place in given:
        if is_url(place):
            if "*" in place:
                files, path = filesystem(place)
                shards += sorted(files.unstrip_protocol(found) for found in files.glob(path))
            else:
                shards.append(place)
        elif Path(place).is_dir():
            shards += sorted(str(path) for path in Path(place).glob("*.tar"))
        else:
            shards.append(place)
    if not shards:
        raise ValueError(f"no shards (*.tar) in {', '.join(given)}")
    return shards


def _beside(shards: Sequence[str]) -> Path:
    from fastjepa.data.shards.index import INDEX_NAME
    from fastjepa.data.shards.store import is_url

    folders = {Path(shard).resolve().parent for shard in shards if not is_url(shard)}
    if len(folders) != 1 or any(map(is_url, shards)):
        raise ValueError(
            "these shards are not in one folder of this machine: say with --out where the index goes"
        )
    return Path(shards[0]).parent / INDEX_NAME


def _pack(options: argparse.Namespace) -> int:
    from fastjepa.commands.bar import progress
    from fastjepa.data.packing.pack import Packing, pack
    from fastjepa.data.packing.report import say

    packing = Packing(
        short_side=options.short_side,
        quality=options.quality,
        shard_bytes=options.shard_size,
        copy_small=options.copy_small,
        in_order=options.in_order,
    )
    report = pack(options.folder, options.out, packing, options.workers, progress)
    print(_printable(say(report, options.out)))
    return 0


def _stats(options: argparse.Namespace) -> int:
    import json

    from fastjepa.commands.bar import progress
    from fastjepa.data.stats import measure, open_set, say

    file: Path | None = options.json
    if file is not None and file.exists() and not options.force:
        return refuse(f"{file} exists; give another name, or --force to replace it")
    if file is not None and not file.parent.is_dir():
        return refuse(f"there is no folder {file.parent} to write {file.name} into")
    found = measure(open_set(options.root), options.images, options.size, options.workers, progress)
    if file is not None:
        half = file.with_name(f"{file.name}.tmp")
        half.write_text(json.dumps(found.to_dict(), indent=1) + "\n", encoding="utf-8")
        half.replace(file)
    print(_printable(say(found)))
    return 0
