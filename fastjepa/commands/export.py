"""`fastjepa export`: an encoder for another tool, read back by it before it is put in place."""

import argparse
import re
from pathlib import Path
from typing import Any

from fastjepa.commands.refusal import refuse

FORMATS = ("official", "transformers", "transformers-mae", "timm", "safetensors", "onnx", "torch")


def add_to(commands: Any) -> None:
    what = "hand an encoder over to another tool"
    parser = commands.add_parser("export", help=what, description=f"{what[0].upper()}{what[1:]}.")
    parser.add_argument(
        "source",
        type=Path,
        metavar="RUN_OR_CHECKPOINT",
        help="a run (its newest good checkpoint), a checkpoint, or a published file",
    )
    parser.add_argument(
        "out", type=Path, metavar="OUT", help="NAME.pth.tar, .safetensors, .onnx or .pt2, or a folder"
    )
    parser.add_argument("--format", choices=FORMATS, help="by default what OUT's ending says")
    parser.add_argument(
        "--encoder",
        choices=("target", "context"),
        help="of a JEPA; by default target, the one that is judged",
    )
    parser.add_argument(
        "--image-size", type=image_size, metavar="N", help="pixels of a side, or HxW; by default as trained"
    )
    parser.add_argument(
        "--heads",
        type=heads,
        default=(),
        metavar="N[,M]",
        help="attention heads of a published file, if not those of its width: of its encoder, and of "
        "its predictor or decoder",
    )
    parser.add_argument("--head", type=Path, metavar="FILE", help="a linear classifier that goes with it")
    parser.add_argument("--force", action="store_true", help="replace OUT: a file, or an earlier export")
    parser.set_defaults(do=run)


def image_size(text: str) -> tuple[int, int]:
    """Pixels: height, width."""
    found = re.fullmatch(r"([1-9]\d{0,5})(?:x([1-9]\d{0,5}))?", text)
    if found is None:
        raise argparse.ArgumentTypeError(f"must be a number of pixels such as 224, or 224x448, got {text!r}")
    return int(found[1]), int(found[2] or found[1])


def heads(text: str) -> tuple[int, ...]:
    """Of the encoder, and of the other network."""
    if re.fullmatch(r"[1-9]\d{0,3}(,[1-9]\d{0,3})?", text) is None:
        raise argparse.ArgumentTypeError(f"must be a number of heads such as 12, or 12,16, got {text!r}")
    return tuple(map(int, text.split(",")))


def run(options: argparse.Namespace) -> int:
    from fastjepa.engine.checkpoints.checkpoint import CheckpointError
    from fastjepa.interop.export import TOLERANCE, check_packages, export, prepare
    from fastjepa.interop.formats import choose_format
    from fastjepa.interop.head import load_head
    from fastjepa.interop.provenance import provenance_of
    from fastjepa.interop.staging import check_place
    from fastjepa.interop.start import load_trained

    out: Path = options.out
    try:
        form = choose_format(options.format, out)
        check_place(out, form.is_folder, options.force)  # before anything large is read
        check_packages(form)
        model, checkpoint = load_trained(options.source, options.heads)
        head = None if options.head is None else load_head(options.head, model.encoder.shape.width)
        given = prepare(model, form, options.encoder, options.image_size, head)
        done = export(given, form, provenance_of(checkpoint), out, options.force)
    except (CheckpointError, ValueError) as error:  # of the configuration, the head or the export
        return refuse(error)
    except OSError as error:
        return refuse(f"cannot write {out}: {error}")
    print(f"Wrote {out}, from {checkpoint}")
    print(f"{done.tool} reads it back: largest difference {done.difference:.1e}, allowed {TOLERANCE:.0e}")
    print(f"Card: {done.card}")
    if options.source.is_file() and not options.heads:
        print(
            f"Heads: {model.encoder.shape.heads}, as the file or its width says; if it has others, --heads N"
        )
    if form.name == "timm":
        from fastjepa.interop.timm_vit import recipe_of

        print(recipe_of(given.encoder, 0 if head is None else len(head.weight)).call())
    return 0
