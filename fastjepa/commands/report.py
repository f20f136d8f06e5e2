"""`fastjepa report`: write the report of a run folder again."""

import argparse
from pathlib import Path
from typing import Any

from fastjepa.commands.refusal import refuse


def add_to(commands: Any) -> None:
    parser = commands.add_parser("report", help="write the report of a run again")
    parser.add_argument("run", type=Path, metavar="RUN", help="the folder of a run")
    parser.set_defaults(do=run)


def run(options: argparse.Namespace) -> int:
    from fastjepa.report import write_report

    try:
        print(f"Report: {write_report(options.run)}")
    except OSError as error:
        return refuse(error)
    return 0
