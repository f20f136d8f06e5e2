"""`fastjepa export`: weights as one file in the published layout of their method."""

import argparse
from pathlib import Path
from typing import Any

from fastjepa.commands.refusal import refuse


def add_to(commands: Any) -> None:
    parser = commands.add_parser("export", help="write weights in the published layout of I-JEPA or MAE")
    parser.add_argument("source", type=Path, metavar="RUN_OR_CHECKPOINT", help="its newest good checkpoint")
    parser.add_argument("file", type=Path, metavar="FILE", help="such as encoder.pth.tar")
    parser.add_argument("--force", action="store_true", help="replace FILE")
    parser.set_defaults(do=run)


def run(options: argparse.Namespace) -> int:
    from fastjepa.config import ConfigError
    from fastjepa.engine.checkpoints.checkpoint import CheckpointError
    from fastjepa.interop import save_official
    from fastjepa.interop.start import load_trained

    file: Path = options.file
    if file.exists() and not options.force:
        return refuse(f"{file} exists; give another name, or --force to replace it")
    if not file.parent.is_dir():
        return refuse(f"there is no folder {file.parent} to write {file.name} into")
    try:
        model, checkpoint = load_trained(options.source)
    except (ConfigError, CheckpointError) as error:
        return refuse(error)
    try:
        save_official(model, file)
    except (OSError, RuntimeError) as error:  # torch.save reports a full disk with the latter
        return refuse(f"cannot write {file}: {error}")
    print(f"Wrote {file}, from {checkpoint}")
    return 0
