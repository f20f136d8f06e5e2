"""The formats that weights are handed over in: how each is written, run by its own tool, and loaded."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from fastjepa.interop import graphs, huggingface, loading, tensorfile, timm_vit, vit_mae
from fastjepa.interop.head import LinearHead
from fastjepa.interop.official import load_official, save_official
from fastjepa.interop.staging import ExportError
from fastjepa.models import VisionTransformer
from fastjepa.objectives import JEPA, MAE


@dataclass(frozen=True)
class Handover:
    """What is handed over.

    Attributes:
        model: what was trained.
        which: of its encoders, `target` or `context`.
        encoder: that one, at the image size asked for, in fp32 on the CPU.
        head: a linear classifier on its features.
    """

    model: JEPA | MAE
    which: str
    encoder: VisionTransformer
    head: LinearHead | None = None


Said = tuple[Tensor | None, ...]
"""Tokens [B, N, D], and logits [B, classes] where there is a head. Of an MAE and its decoder `Painted`."""


@torch.no_grad()
def _encoder_says(given: Handover, images: Tensor) -> Said:
    tokens = given.encoder(images)  # [B, N, D]
    features = tokens[:, int(given.encoder.shape.class_token) :].mean(dim=1)  # [B, D]
    return tokens, None if given.head is None else given.head.logits(features)


@dataclass(frozen=True)
class Format:
    """Attributes:
    name: for --format.
    suffixes: of its file, the usual one first; none if it is a folder.
    packages: what writing and reading it back needs besides an install without extras.
    takes_head: whether a linear head can go with it.
    takes_encoder: whether it holds one encoder, which may be chosen and be for another size of image.
    tool: what reads it back.
    write: to a path, which is not there yet.
    run: has its own tool read that path, and gives what it says of uint8 images [B, C, H, W], B at least 2.
    lines: of Python that load a file or folder of some name.
    ours: what `run` should give.
    """

    name: str
    suffixes: tuple[str, ...]
    packages: tuple[str, ...]
    takes_head: bool
    takes_encoder: bool
    tool: str
    write: Callable[[Handover, Path], None]
    run: Callable[[Handover, Path, Tensor], Said]
    lines: Callable[[Handover, str], str]
    ours: Callable[[Handover, Tensor], Said] = _encoder_says

    @property
    def is_folder(self) -> bool:
        return not self.suffixes


@torch.no_grad()
def _run_official(given: Handover, path: Path, images: Tensor) -> Said:
    found = load_official(path)
    wanted, there = given.model.state_dict(), found.state_dict()
    if wanted.keys() != there.keys() or not all(
        torch.equal(there[n].cpu(), t.cpu()) for n, t in wanted.items()
    ):
        raise ExportError(f"{path.name} does not hold what was trained")
    encoder = found.target_encoder if isinstance(found, JEPA) and given.which == "target" else found.encoder
    encoder.pixel_mean, encoder.pixel_std = given.encoder.pixel_mean, given.encoder.pixel_std
    return encoder(images), None


@torch.no_grad()
def _run_tensors(_given: Handover, path: Path, images: Tensor) -> Said:
    return tensorfile.load_encoder(path)(images), None


FORMATS = (
    Format(
        "official",
        (".pth.tar", ".pth"),
        (),
        takes_head=False,
        takes_encoder=False,
        tool="fastjepa",
        write=lambda given, path: save_official(given.model, path),
        run=_run_official,
        lines=lambda given, name: loading.load_with_fastjepa(given.encoder, given.model, given.which, name),
    ),
    Format(
        "transformers",
        (),
        ("transformers", "torchvision"),
        takes_head=True,
        takes_encoder=True,
        tool="transformers",
        write=lambda given, path: huggingface.save_transformers(given.encoder, given.head, path),
        run=lambda _given, path, images: huggingface.run_transformers(path, images),
        lines=lambda given, name: loading.load_in_transformers(given.encoder, given.head, name),
    ),
    Format(
        "transformers-mae",
        (),
        ("transformers", "torchvision"),
        takes_head=False,
        takes_encoder=False,
        tool="transformers",
        write=lambda given, path: vit_mae.save_vit_mae(given.model, path),
        run=lambda _given, path, images: vit_mae.run_vit_mae(path, images),
        lines=lambda given, name: loading.load_mae_in_transformers(given.encoder, name),
        ours=lambda given, images: vit_mae.run_mae(given.model, images),
    ),
    Format(
        "timm",
        (),
        ("timm", "torchvision"),
        takes_head=True,
        takes_encoder=True,
        tool="timm",
        write=lambda given, path: timm_vit.save_timm(given.encoder, given.head, path),
        run=lambda _given, path, images: timm_vit.run_timm(path, images),
        lines=lambda given, name: loading.load_in_timm(given.encoder, given.head, name),
    ),
    Format(
        "safetensors",
        (".safetensors",),
        (),
        takes_head=False,
        takes_encoder=True,
        tool="safetensors",
        write=lambda given, path: tensorfile.save_encoder(given.encoder, path),
        run=_run_tensors,
        lines=lambda given, name: loading.load_tensors(given.encoder, name),
    ),
    Format(
        "onnx",
        (".onnx",),
        ("onnx", "onnxscript", "onnxruntime"),
        takes_head=True,
        takes_encoder=True,
        tool="onnxruntime",
        write=lambda given, path: graphs.save_onnx(given.encoder, given.head, path),
        run=lambda _given, path, images: graphs.run_onnx(path, images),
        lines=lambda given, name: loading.load_in_onnxruntime(given.encoder, given.head, name),
    ),
    Format(
        "torch",
        (".pt2",),
        (),
        takes_head=True,
        takes_encoder=True,
        tool="torch",
        write=lambda given, path: graphs.save_program(given.encoder, given.head, path),
        run=lambda _given, path, images: graphs.run_program(path, images),
        lines=lambda given, name: loading.load_program(given.encoder, given.head, name),
    ),
)
NAMES = tuple(form.name for form in FORMATS)


def choose_format(name: str | None, out: Path) -> Format:
    """The format of that name; without one, that which OUT's ending is of.

    Raises:
        ExportError: no format has that ending, or the format asked for has another.
    """
    plain = next((form for form in FORMATS if out.name.endswith(form.suffixes)), None) if out.name else None
    if name is None:
        if plain is None:
            endings = ", ".join(f"{f.name} ({f.suffixes[0] if f.suffixes else 'a folder'})" for f in FORMATS)
            raise ExportError(f"{out.name or out} does not say its format; give --format: {endings}")
        return plain
    chosen = next(form for form in FORMATS if form.name == name)
    if chosen.suffixes and plain is not chosen:
        raise ExportError(f"a file of format {name} is called NAME{chosen.suffixes[0]}, got {out.name}")
    if chosen.is_folder and plain is not None:
        raise ExportError(f"format {name} is a folder, and {out.name} is the name of a file of {plain.name}")
    return chosen
