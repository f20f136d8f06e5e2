"""Write an export, have its own tool read it back, and only then put it where it belongs."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor

from fastjepa import __version__
from fastjepa.interop.card import write_card
from fastjepa.interop.formats import Format, Handover, Said
from fastjepa.interop.head import LinearHead
from fastjepa.interop.portable import at_image_size, choose_encoder
from fastjepa.interop.provenance import Provenance
from fastjepa.interop.staging import ExportError, card_beside, check_place, mark, place, staging
from fastjepa.interop.vit_mae import decoder_of
from fastjepa.objectives import JEPA, MAE

TOLERANCE = 1e-5  # of the largest value: some ulps of fp32, added up over the blocks
IMAGES = 4  # random ones; tools with a dynamic batch are given one, and then three


@dataclass(frozen=True)
class Exported:
    """Attributes:
    path: the file or folder.
    card: its model card.
    tool: what read it back, and its version.
    difference: see `largest_difference`.
    """

    path: Path
    card: Path
    tool: str
    difference: float


def prepare(
    model: JEPA | MAE,
    form: Format,
    encoder: str | None = None,
    image_size: tuple[int, int] | None = None,
    head: LinearHead | None = None,
) -> Handover:
    """What is to be exported.

    Raises:
        ExportError: the format cannot hold it, or there is no such encoder or size.
    """
    if not form.takes_encoder and (encoder is not None or image_size is not None):
        raise ExportError(
            f"format {form.name} holds all networks at their trained size: leave out --encoder and "
            "--image-size, or take another format"
        )
    if head is not None and not form.takes_head:
        raise ExportError(f"format {form.name} holds no classifier: leave --head out, or take another format")
    if head is not None and form.name == "transformers" and model.encoder.shape.class_token:
        raise ExportError(
            "format transformers has no classifier on the mean of an MAE's patches, only on its class token: "
            "leave --head out, or take timm, onnx or torch"
        )
    try:
        if form.name == "transformers-mae":
            decoder_of(model)
        chosen = choose_encoder(model, encoder)
        resized = at_image_size(chosen, image_size or chosen.shape.image_size)
    except ValueError as error:
        raise ExportError(str(error)) from error
    if form.name != "safetensors" and resized.shape.channels not in (1, 3):
        raise ExportError(
            f"this encoder takes {resized.shape.channels} channels, and images of 1 or 3 are prepared by the "
            "other tools: take format safetensors"
        )
    which = "target" if isinstance(model, JEPA) and encoder != "context" else "context"
    return Handover(model, which, resized, head)


def check_packages(form: Format) -> None:
    """Raises ExportError: a package that the format needs is not installed."""
    missing = [name for name in form.packages if find_spec(name) is None]
    if missing:
        raise ExportError(
            f"format {form.name} needs {', '.join(missing)}, which is not installed: "
            "pip install 'fastjepa[export]'"
        )


def export(given: Handover, form: Format, origin: Provenance, out: Path, force: bool = False) -> Exported:
    """Write `given` to `out`, with its card: all of it, or nothing.

    Args:
        given: as `prepare` made it.
        form: the format.
        origin: for the card.
        out: a file or a folder that is not there yet.
        force: or that is replaced, a folder only if it was exported.

    Raises:
        ExportError: something is in the way, a package is missing, or its tool reads something else.
        OSError: it cannot be written.
    """
    check_place(out, form.is_folder, force)
    check_packages(form)
    with _memory_for(given):
        ours = _ours(given, form)
    with staging(out) as staged:
        path = staged / out.name
        try:
            form.write(given, path)
        except (RuntimeError, SafetensorError) as error:  # how torch and safetensors report a full disk
            raise OSError(str(error)) from error
        with _memory_for(given):
            theirs = form.run(given, path, _images(given))
        difference = largest_difference(ours, theirs)
        tool = f"{form.tool} {_version(form.tool)}"
        if not difference <= TOLERANCE:  # so is one that is not a number
            raise ExportError(
                f"{tool} reads what was written otherwise than it is here: the largest difference is "
                f"{difference:.1e} and may be {TOLERANCE:.0e}. Nothing was left behind; please report it"
            )
        checked = (
            f"Read back by {tool} and run on {IMAGES} random images, beside fastjepa "
            f"{__version__}, in fp32 on a CPU: the largest difference is {difference:.1e} of the largest "
            f"value, and {TOLERANCE:.0e} was allowed."
        )
        card = out / "README.md" if form.is_folder else card_beside(out)
        text = write_card(given, form, origin, out.name, checked)
        (path / card.name if form.is_folder else staged / card.name).write_text(text, encoding="utf-8")
        if form.is_folder:
            says = {"written_by": f"fastjepa {__version__}", "format": form.name, "source": origin.source}
            mark(path, says | {"encoder": given.which, "largest_difference": difference})
        place(staged, out)
    return Exported(out, card, tool, difference)


@contextmanager
def _memory_for(given: Handover) -> Iterator[None]:
    """Tools say in ways of their own that there is too little, but all by that word."""
    try:
        yield
    except Exception as error:
        if not isinstance(error, MemoryError) and "allocate memory" not in str(error):
            raise
        height, width = given.encoder.shape.image_size
        raise ExportError(
            f"there is too little memory here to check it on {IMAGES} images of {height} x {width}: take "
            "smaller ones, or a machine with more"
        ) from error


def largest_difference(ours: Said, theirs: Said) -> float:
    """Of any tensor, in units of our largest value there or of 1; not a number where one of them is none.

    Raises:
        ExportError: shapes differ.
    """
    worst = torch.zeros((), dtype=torch.float64)
    for own, other in zip(ours, theirs, strict=True):
        if own is None and other is None:
            continue
        if own is None or other is None or own.shape != other.shape:
            shapes = [None if tensor is None else list(tensor.shape) for tensor in (own, other)]
            raise ExportError(f"what was written gives {shapes[1]}, and should give {shapes[0]}")
        scale = own.double().abs().max().clamp(min=1)
        worst = torch.maximum(worst, (own.double() - other.double()).abs().max() / scale)  # NaN stays
    return worst.item()


def _images(given: Handover) -> Tensor:
    shape = given.encoder.shape
    generator = torch.Generator().manual_seed(0)
    size = (IMAGES, shape.channels, *shape.image_size)
    return torch.randint(0, 256, size, dtype=torch.uint8, generator=generator)


def _ours(given: Handover, form: Format) -> Said:
    said = form.ours(given, _images(given))
    if not all(tensor is None or tensor.isfinite().all() for tensor in said):
        raise ExportError("what the model gives is not finite: the run has diverged; take another checkpoint")
    return said


def _version(package: str) -> str:
    return __version__ if package == "fastjepa" else metadata.version(package)
