"""The `fastjepa` command: train, report and export.

Only what an install without extras has is imported before it is known what is asked for.
"""

import argparse
import sys
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
    from fastjepa.engine.checkpoint import CheckpointError
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
    return parser


def _refuse(reason: str) -> int:
    print(f"error: {reason}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
