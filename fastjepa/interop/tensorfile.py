"""An encoder as one safetensors file: its tensors under their own names, and what rebuilds it beside them."""

import dataclasses
import json
import os
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from fastjepa import __version__
from fastjepa.interop.official import load_strict
from fastjepa.models import VisionTransformer, ViTShape

FORMAT = "fastjepa encoder 1"


def save_encoder(encoder: VisionTransformer, path: str | os.PathLike[str]) -> None:
    """Write the tensors of an encoder in fp32; its shape and the pixels' mean and std are the metadata.

    Raises:
        OSError: it cannot be written.
    """
    metadata = {
        "format": FORMAT,
        "shape": json.dumps(dataclasses.asdict(encoder.shape)),
        "pixel_mean": json.dumps(encoder.pixel_mean),
        "pixel_std": json.dumps(encoder.pixel_std),
        "written_by": f"fastjepa {__version__}",
    }
    state = encoder.state_dict()
    tensors = {name: tensor.detach().float().cpu().contiguous() for name, tensor in state.items()}
    try:
        save_file(tensors, path, metadata=metadata)
    except SafetensorError as error:  # how safetensors reports a full disk
        raise OSError(f"writing {path}: {error}") from error


def load_encoder(path: str | os.PathLike[str]) -> VisionTransformer:
    """The encoder that `save_encoder` wrote, in fp32 on the CPU.

    Raises:
        ValueError: it is no such file, or one whose tensors do not fit its shape.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != FORMAT:
                raise ValueError(f"its format is {metadata.get('format')!r}, and {FORMAT!r} is read")
            shape = json.loads(metadata["shape"])
            shape["image_size"] = tuple(shape["image_size"])
            mean, std = (tuple(json.loads(metadata[name])) for name in ("pixel_mean", "pixel_std"))
            encoder = VisionTransformer(ViTShape(**shape), mean, std)
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
        load_strict(encoder, state, Path(path).name)
    except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not read as an encoder: {error}") from error
    return encoder.eval()
