"""`fastjepa track`: send the metrics of a run to TensorBoard or Weights & Biases, afterwards."""

import argparse
from pathlib import Path
from typing import Any

from fastjepa.commands.refusal import refuse

TRACKERS = ("tensorboard", "wandb")


def add_to(commands: Any) -> None:
    what = "send the metrics of a run to TensorBoard or Weights & Biases, as run.track does while it trains"
    parser = commands.add_parser("track", help=what, description=f"{what[0].upper()}{what[1:]}.")
    parser.add_argument("run", type=Path, metavar="RUN", help="the folder of a run that is not under way")
    parser.add_argument("--to", choices=TRACKERS, required=True)
    parser.set_defaults(do=run)


def run(options: argparse.Namespace) -> int:
    from fastjepa.config import ConfigError
    from fastjepa.engine.folder import RunFolder
    from fastjepa.engine.metrics import read_rows
    from fastjepa.engine.tracking import check_tracking, send_rows

    folder = RunFolder(options.run)
    try:
        rows = read_rows(folder.metrics)
        config = folder.read_config()
        check_tracking([options.to])
        config.run.resume = "auto"  # what it was started with does not matter here
        with folder.open(config):  # the lock: while it trains it may be sending itself
            count = send_rows(options.to, folder, config, rows)
    except FileNotFoundError as error:
        return refuse(f"{options.run} is no folder of a run: it has no {Path(error.filename).name}")
    except (ConfigError, OSError) as error:
        return refuse(error)
    print(f"Sent {count:,} rows of {folder.metrics} to {options.to}")
    return 0
