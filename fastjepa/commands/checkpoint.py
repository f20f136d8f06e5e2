"""`fastjepa checkpoint ls|verify|prune`: look after the checkpoints of a run."""

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastjepa.commands.refusal import count, refuse

ACTIONS = (
    ("ls", "what there is, and why it is kept"),
    ("verify", "read every byte and compare it with the manifests; exit 1 if any is damaged"),
    ("prune", "delete what need not be kept, and what killed runs left half written"),
)


def add_to(commands: Any) -> None:
    parser = commands.add_parser("checkpoint", help="list, verify or prune checkpoints")
    parser.set_defaults(do=run)
    actions = parser.add_subparsers(dest="action", required=True, metavar="action")
    for name, what in ACTIONS:
        action = actions.add_parser(name, help=what, description=what)
        action.add_argument(
            "source", type=Path, metavar="RUN_OR_DIR", help="the folder of a run, or its checkpoints"
        )
        if name == "prune":
            action.add_argument("--keep-last", type=count, required=True, metavar="K", help="of the newest")
            action.add_argument("--keep-every", type=count, metavar="N", help="those of steps that N divides")
            action.add_argument("--dry-run", action="store_true", help="only say what would go")


def run(options: argparse.Namespace) -> int:
    from fastjepa.engine.checkpoints.checkpoint import CheckpointError, list_checkpoints
    from fastjepa.engine.checkpoints.listing import checkpoints_of, is_checkpoint

    source = options.source.resolve()
    try:
        directory = checkpoints_of(source)
        if options.action == "ls":
            return _list(directory)
        if options.action == "verify":
            return _verify([source] if is_checkpoint(source) else list_checkpoints(directory), directory)
        if is_checkpoint(source):
            return refuse(
                f"{source} is one checkpoint, and prune chooses among all of a run: give {directory}, or "
                "delete that folder yourself to be rid of it alone"
            )
        return _prune(directory, options.keep_last, options.keep_every, dry_run=options.dry_run)
    except (CheckpointError, OSError) as error:
        return refuse(error)


def _list(directory: Path) -> int:
    from fastjepa.engine.checkpoints.checkpoint import list_checkpoints
    from fastjepa.engine.checkpoints.listing import describe, table

    looked_at = [describe(path) for path in list_checkpoints(directory)]
    print("\n".join(table([found for found in looked_at if found is not None], time.time())))
    for path in sorted(directory.glob("step_*.tmp")):
        print(f"{path} is being written, or was when its run was killed")
    for path in sorted(directory.glob("step_*.aside*")):
        print(f"{path} was in the way of a new checkpoint, and is for you to delete")
    return 0


def _verify(paths: Sequence[Path], directory: Path) -> int:
    from fastjepa.engine.checkpoints.checkpoint import OtherVersion
    from fastjepa.engine.checkpoints.verify import damage_of

    good = damaged = unknown = 0
    for path in paths:
        try:
            lines = damage_of(path)
        except OtherVersion as error:
            unknown += 1
            lines = [str(error)]
        else:
            if not path.is_dir():  # a run deletes old ones while one reads
                print(f"{path} is gone: deleted while it was to be read", flush=True)
                continue
            good, damaged = good + (not lines), damaged + bool(lines)
        print("\n".join(lines) if lines else f"{path} is good", flush=True)
    if damaged or unknown:
        others = f", {unknown} of another version" if unknown else ""
        return refuse(f"{damaged} of {len(paths)} checkpoints are damaged{others}")
    if not good:
        return refuse(f"nothing was verified: {directory} holds no complete checkpoint")
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
