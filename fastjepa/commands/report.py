"""`fastjepa report`: write the report of a run folder again, or keep it up with a run that is going."""

import argparse
import errno
import signal
from contextlib import closing
from pathlib import Path
from typing import Any

from fastjepa.commands.refusal import count, refuse

OF_A_RUN = ("config.yaml", "metrics.jsonl", ".lock", "report/summary.json")
EVERY_S = 20  # a page takes some seconds of one core


def add_to(commands: Any) -> None:
    parser = commands.add_parser(
        "report", help="write the report of a run again, or follow one that is going"
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="the folder of a run")
    parser.add_argument(
        "--watch",
        type=count,
        nargs="?",
        const=EVERY_S,
        metavar="SECONDS",
        help=f"write the page again as the run changes, every {EVERY_S} seconds at most, until the run ends",
    )
    parser.set_defaults(do=run)


def run(options: argparse.Namespace) -> int:
    from fastjepa.report import write_report

    if options.run.is_dir() and not any((options.run / name).exists() for name in OF_A_RUN):
        return refuse(f"{options.run} is not the folder of a run; {_where_it_is(options.run)}")
    try:
        if options.watch is not None:
            return _watch(options.run, options.watch)
        print(f"Report: {write_report(options.run)}")
    except BrokenPipeError:
        raise
    except OSError as error:
        return refuse(_said(error, options.run))
    return 0


def _said(error: OSError, run_dir: Path) -> str:
    """What is wrong, and what to do: our own words, or those of the system about a file that was written."""
    if error.errno is None:
        return str(error)
    is_full = error.errno in (errno.ENOSPC, errno.EDQUOT)
    remedy = "free space there" if is_full else "let this user write there, or copy the run to where it may"
    return f"cannot write the report in {run_dir / 'report'}: {error.strerror}; {remedy}"


def _where_it_is(folder: Path) -> str:
    """What to give instead: a page in a checkpoint would be a file that its manifest does not list."""
    for above in folder.resolve().parents[:2]:
        if (above / "config.yaml").exists():
            return f"its run is {above}"
    return "give the folder that a run wrote (its `run.dir`)"


def _watch(run_dir: Path, every_s: int) -> int:
    """Say where the page is, and then only how the run ended."""
    from fastjepa.report.watch import watch_report

    said = False
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: the page must not stay live
    try:
        with closing(watch_report(run_dir, every_s)) as pages:
            for path, status in pages:
                if not said:
                    print(f"Report: {path}", flush=True)
                    said = True
                if not status.is_live:
                    print(f"The run has {_AFTER[status.state]} at step {status.step:,}")
    except KeyboardInterrupt:
        print("\nThe page stays as it is; the same command follows the run again")
    return 0


_AFTER = {"ended": "ended", "stopped": "been stopped", "broken off": "broken off"}
