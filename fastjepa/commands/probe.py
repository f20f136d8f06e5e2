"""`fastjepa probe`: the published protocols on a trained encoder, and stored results side by side."""

import argparse
import logging
from pathlib import Path
from typing import Any

from fastjepa.commands.refusal import count, refuse
from fastjepa.probe import ENCODERS, PROTOCOLS


def add_to(commands: Any) -> None:
    parser = commands.add_parser(
        "probe", help="judge an encoder by the published protocols, or compare results"
    )
    parser.add_argument(
        "source",
        type=Path,
        nargs="?",
        metavar="RUN_OR_CHECKPOINT",
        help="a run folder, a checkpoint, or a published .pth.tar",
    )
    parser.add_argument(
        "--compare",
        type=Path,
        nargs="+",
        metavar="RUN",
        help="print stored results, of runs or files, beside the first",
    )
    parser.add_argument(
        "--encoder",
        type=_choices(ENCODERS),
        metavar="target|context",
        help="or target,context, which is the default of a JEPA",
    )
    parser.add_argument(
        "--protocol",
        type=_choices(PROTOCOLS),
        default=PROTOCOLS,
        metavar="NAME,NAME",
        help=f"of {','.join(PROTOCOLS)}; all by default",
    )
    parser.add_argument(
        "--data",
        nargs="+",
        default=(),
        metavar="FOLDER",
        help="of class folders, or of indexed shards: one, perhaps with train and val in it, or two; the "
        "run's own by default; fashion_mnist is embedded",
    )
    parser.add_argument(
        "--baseline",
        action="append",
        default=[],
        metavar="ENCODER",
        help="timm:NAME, timm:NAME=FILE.safetensors, hf:NAME or hf:FOLDER; may be repeated",
    )
    parser.add_argument("--out", type=Path, metavar="FILE", help="by default RUN/probe/STEP-ENCODER.json")
    parser.add_argument("--force", action="store_true", help="replace it")
    parser.add_argument(
        "--blocks", type=count, default=4, metavar="N", help="of the wider linear features (4)"
    )
    parser.add_argument(
        "--k", type=_counts, default=(10, 20, 100), metavar="K,K", help="neighbours (10,20,100)"
    )
    parser.add_argument("--epochs", type=count, default=90, metavar="N", help="of the linear sweep (90)")
    parser.add_argument("--attentive-epochs", type=count, default=20, metavar="N", help="(20)")
    parser.add_argument(
        "--splits", type=count, default=5, metavar="N", help="draws of few labels, 2 to 10 (5)"
    )
    parser.add_argument("--train-images", type=count, metavar="N", help="spread evenly over the set")
    parser.add_argument("--test-images", type=count, metavar="N", help="likewise")
    parser.add_argument(
        "--memory",
        type=_positive,
        default=8.0,
        metavar="GIB",
        help="that the features of one encoder may take (8)",
    )
    parser.add_argument(
        "--cache", type=Path, metavar="FOLDER", help="keep features there, and take them from there"
    )
    parser.add_argument("--heads", type=count, metavar="N", help="of the encoder of a file, where unknown")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32", help="of the encoders")
    parser.add_argument(
        "--workers", type=_count_or_none, default=0, metavar="N", help="processes that read images (0)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of splits, draws and initial weights (0)")
    parser.set_defaults(do=run)  # fmt: skip


def run(options: argparse.Namespace) -> int:
    from fastjepa.data.unreadable import TooManyUnreadable
    from fastjepa.data.workers import WorkersDied
    from fastjepa.probe.subjects import ProbeError

    if (options.source is None) == (options.compare is None):
        return refuse("give a RUN_OR_CHECKPOINT to probe, or --compare and two results or more")
    handler = _Warnings()
    logging.getLogger("fastjepa").addHandler(handler)
    try:
        return _probe(options) if options.compare is None else _compare(options)
    except (ProbeError, TooManyUnreadable, WorkersDied, TimeoutError) as error:
        return refuse(error)
    except OSError as error:
        return refuse(f"cannot read or write {error.filename or 'a file'}: {error.strerror or error}")
    finally:
        logging.getLogger("fastjepa").removeHandler(handler)


def _probe(options: argparse.Namespace) -> int:
    from rich.console import Console

    from fastjepa.evaluation.attentive import AttentiveSettings
    from fastjepa.evaluation.sweep import SweepSettings
    from fastjepa.probe import table
    from fastjepa.probe.protocols import Settings
    from fastjepa.probe.story import Request, probe

    settings = Settings(
        protocols=options.protocol,
        neighbours=options.k,
        blocks=options.blocks,
        linear=SweepSettings(epochs=options.epochs),
        attentive=AttentiveSettings(epochs=options.attentive_epochs),
        splits=options.splits,
        seed=options.seed,
    )
    request = Request(
        source=options.source,
        encoders=options.encoder or (),
        settings=settings,
        data=tuple(options.data),
        baselines=tuple(options.baseline),
        out=options.out,
        force=options.force,
        train_images=options.train_images,
        test_images=options.test_images,
        memory_gib=options.memory,
        cache=options.cache,
        heads=options.heads,
        device=options.device,
        precision=options.precision,
        workers=options.workers,
    )
    console = Console(soft_wrap=True, highlight=False)
    written = probe(request, lambda text: console.print(text, style="dim", markup=False))
    results = [result for _, result in written]
    if not console.is_terminal:
        console.width = max(console.width, table.width_of(results))
    console.print()
    if any(result.rows for result in results):
        console.print(table.accuracies(results))
        console.print("percent of the test images, ± to the farther end of the 95 % interval\n", style="dim")
    if any(result.collapse for result in results):
        console.print(table.collapse(results))
    for path, _ in written:
        console.print(f"Wrote {path}", markup=False)
    return 0


def _compare(options: argparse.Namespace) -> int:
    from rich.console import Console

    from fastjepa.probe import table
    from fastjepa.probe.compare import compare, notes
    from fastjepa.probe.results import find_results, read_result
    from fastjepa.probe.subjects import ProbeError

    if len(options.compare) < 2:
        raise ProbeError("--compare needs two results or more: runs, or files that fastjepa probe wrote")
    paths = [find_results(source, options.encoder or ENCODERS) for source in options.compare]
    results = [read_result(path) for path in paths]
    first, *others = results
    console = Console(soft_wrap=True, highlight=False)
    if not console.is_terminal:
        console.width = 30 + 50 * len(results)
    names = [_name(path, result.encoder) for path, result in zip(paths, results, strict=True)]
    console.print(table.differences(names, [compare(first, other) for other in others]))
    for name, other in zip(names[1:], others, strict=True):
        for line in notes(first, other):
            console.print(f"{name}: {line}", style="dim", markup=False)
    return 0


def _name(path: Path, encoder: str) -> str:
    """Of a run and the encoder for a file in its probe folder, else of the file."""
    if path.parent.name == "probe":
        return f"{path.parent.parent.resolve().name} {path.stem}"
    return f"{path.stem} {encoder}"


def _choices(allowed: tuple[str, ...]) -> Any:
    def chosen(text: str) -> tuple[str, ...]:
        names = tuple(dict.fromkeys(name.strip() for name in text.split(",")))
        wrong = [name for name in names if name not in allowed]
        if wrong:
            raise argparse.ArgumentTypeError(f"{wrong[0]!r} is none of {', '.join(allowed)}")
        return names

    return chosen


def _counts(text: str) -> tuple[int, ...]:
    return tuple(dict.fromkeys(count(part.strip()) for part in text.split(",")))


def _count_or_none(text: str) -> int:
    return 0 if text == "0" else count(text)


def _positive(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"must be a number above 0, got {text!r}")
    return value


class _Warnings(logging.Handler):
    """What the lower layers warn of, as a line on stderr."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)

    def emit(self, record: logging.LogRecord) -> None:
        import sys

        print(f"warning: {record.getMessage()}", file=sys.stderr)
