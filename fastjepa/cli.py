"""The `fastjepa` command: train, report, export and checkpoint.

Only what an install without extras has is imported before it is known what is asked for.
"""

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from fastjepa import __version__


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; the exit status."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    try:
        if given[:1] == ["train"]:  # has a parser of its own
            from fastjepa.train import main as train

            return train(given[1:], prog="fastjepa train")
        options = _parser().parse_args(given)
        if options.command == "report":
            return report(options.run)
        if options.command == "checkpoint":
            return checkpoint(options)
        return export(options.source, options.file, force=options.force)
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if missing in ("fastjepa", "fastjepa_kernels"):
            raise
        return _refuse(f"this needs {missing}, which is not installed: pip install 'fastjepa[train]'")


def report(run: Path) -> int:
    """Write the report of a run folder again."""
    from fastjepa.report import write_report

    try:
        print(f"Report: {write_report(run)}")
    except OSError as error:
        return _refuse(str(error))
    return 0


def export(source: Path, file: Path, force: bool = False) -> int:
    """Write the weights of a run or a checkpoint as one file in the published layout of its method."""
    from fastjepa.config import ConfigError
    from fastjepa.engine.checkpoints.checkpoint import CheckpointError
    from fastjepa.interop import save_official
    from fastjepa.interop.start import load_trained

    if file.exists() and not force:
        return _refuse(f"{file} exists; give another name, or --force to replace it")
    if not file.parent.is_dir():
        return _refuse(f"there is no folder {file.parent} to write {file.name} into")
    try:
        model, checkpoint = load_trained(source)
    except (ConfigError, CheckpointError) as error:
        return _refuse(str(error))
    try:
        save_official(model, file)
    except (OSError, RuntimeError) as error:  # torch.save reports a full disk with the latter
        return _refuse(f"cannot write {file}: {error}")
    print(f"Wrote {file}, from {checkpoint}")
    return 0


def checkpoint(options: argparse.Namespace) -> int:
    """List, verify or prune checkpoints."""
    from fastjepa.engine.checkpoints.checkpoint import CheckpointError
    from fastjepa.engine.checkpoints.listing import checkpoints_of

    try:
        directory = checkpoints_of(options.source)
        if options.action == "ls":
            return _list(directory)
        if options.action == "verify":
            is_one = options.source.name.startswith("step_") and options.source.is_dir()
            return _verify([options.source] if is_one else directory)
        return _prune(directory, options.keep_last, options.keep_every, dry_run=options.dry_run)
    except (CheckpointError, OSError) as error:
        return _refuse(str(error))


def _list(directory: Path) -> int:
    from fastjepa.engine.checkpoints.checkpoint import list_checkpoints
    from fastjepa.engine.checkpoints.listing import describe, table

    print("\n".join(table([describe(path) for path in list_checkpoints(directory)], time.time())))
    for path in sorted(directory.glob("step_*.tmp")):
        print(f"{path} is being written, or was when its run was killed")
    return 0


def _verify(which: Path | list[Path]) -> int:
    from fastjepa.engine.checkpoints.checkpoint import damage_of, list_checkpoints

    paths = which if isinstance(which, list) else list_checkpoints(which)
    damaged = 0
    for path in paths:
        lines = damage_of(path)
        damaged += bool(lines)
        print("\n".join(lines) if lines else f"{path} is good", flush=True)
    if damaged:
        return _refuse(f"{damaged} of {len(paths)} checkpoints are damaged")
    return 0


def _prune(directory: Path, last: int, every: int | None, *, dry_run: bool) -> int:
    from fastjepa.engine.checkpoints.keep import Keep
    from fastjepa.engine.checkpoints.listing import carry_out, plan_pruning

    done = carry_out(directory, plan_pruning(directory, Keep(last, every)), dry_run=dry_run)
    for note in done.notes:
        print(f"note: {note}")
    for path in done.go:
        print(f"{'would delete' if dry_run else 'deleted'} {path}")
    if not done.go:
        print("nothing to delete")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="fastjepa", description="Pretrain vision encoders with I-JEPA.")
    parser.add_argument("--version", action="version", version=f"fastjepa {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    commands.add_parser("train", help="pretrain an encoder, or resume; fastjepa train --help says more")
    again = commands.add_parser("report", help="write the report of a run again")
    again.add_argument("run", type=Path, metavar="RUN", help="the folder of a run")
    out = commands.add_parser("export", help="write weights in the published layout of I-JEPA or MAE")
    out.add_argument("source", type=Path, metavar="RUN_OR_CHECKPOINT", help="its newest good checkpoint")
    out.add_argument("file", type=Path, metavar="FILE", help="such as encoder.pth.tar")
    out.add_argument("--force", action="store_true", help="replace FILE")
    saved = commands.add_parser("checkpoint", help="list, verify or prune checkpoints")
    actions = saved.add_subparsers(dest="action", required=True, metavar="action")
    for name, what in (
        ("ls", "what there is, and why it is kept"),
        ("verify", "read every byte and compare it with the manifests; exit 1 if any is damaged"),
        ("prune", "delete what need not be kept, and what killed runs left half written"),
    ):
        action = actions.add_parser(name, help=what, description=what)
        action.add_argument(
            "source", type=Path, metavar="RUN_OR_DIR", help="the folder of a run, or its checkpoints"
        )
        if name == "prune":
            action.add_argument("--keep-last", type=_count, required=True, metavar="K", help="of the newest")
            action.add_argument(
                "--keep-every", type=_count, metavar="N", help="those of steps that N divides"
            )
            action.add_argument("--dry-run", action="store_true", help="only say what would go")
    return parser


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, got {text!r}")
    return int(text)


def _refuse(reason: str) -> int:
    print(f"error: {reason}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
