"""The `fastjepa` command.

Only what an install without extras has is imported before it is known what is asked for.
"""

import argparse
import os
import select
import sys
from collections.abc import Sequence

from fastjepa import __version__
from fastjepa.commands import checkpoint, data, doctor, export, probe, report, track
from fastjepa.commands.refusal import refuse

READER_GONE = 141  # as a shell says it of a program that SIGPIPE ended
EXPORT_PACKAGES = {"onnx", "onnxruntime", "onnxscript", "timm", "torchvision", "transformers"}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; the exit status."""
    status = READER_GONE
    try:
        status = _run(list(sys.argv[1:] if arguments is None else arguments))
        sys.stdout.flush()
    except BrokenPipeError:
        if not _is_reader_gone():
            raise
    return status


def _is_reader_gone() -> bool:
    """Whether nobody takes our output any more, as after `| head -1`; what is still in it is thrown away."""
    output = select.poll()
    output.register(sys.stdout, 0)
    if not any(events & select.POLLERR for _, events in output.poll(0)):
        return False
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())
    os.close(nowhere)
    return True


def _run(given: list[str]) -> int:
    try:
        if given[:1] == ["train"]:  # has a parser of its own
            from fastjepa.signals import hold_signals

            hold_signals()  # before all that takes long
            from fastjepa.train import main as train

            return train(given[1:], prog="fastjepa train")
        if given[:1] == ["plan"]:  # so has this, for overrides before and after its options
            from fastjepa.commands.plan import main as plan

            return plan(given[1:])
        options = _parser().parse_args(given)
        status: int = options.do(options)
        return status
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if missing in ("fastjepa", "fastjepa_kernels"):
            raise
        extra = "export" if missing in EXPORT_PACKAGES else "train"
        return refuse(f"this needs {missing}, which is not installed: pip install 'fastjepa[{extra}]'")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="fastjepa", description="Pretrain vision encoders with I-JEPA.")
    parser.add_argument("--version", action="version", version=f"fastjepa {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    commands.add_parser("train", help="pretrain an encoder, or resume; fastjepa train --help says more")
    commands.add_parser(
        "plan", help="what a run would take: memory, batch, hours, cores; plan --help says more"
    )
    for command in (doctor, report, probe, export, checkpoint, data, track):
        command.add_to(commands)
    return parser


if __name__ == "__main__":
    sys.exit(main())
