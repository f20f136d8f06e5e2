"""Encoders as graphs that need no code of ours: ONNX, and what torch.export saves (.pt2).

Both take uint8 [batch, C, H, W], any batch of one or more, and normalise inside: see `PortableEncoder`.
"""

import json
from pathlib import Path

import torch
from torch import Tensor, nn

from fastjepa.interop.head import LinearHead
from fastjepa.interop.portable import PortableEncoder
from fastjepa.models import VisionTransformer


def save_onnx(encoder: VisionTransformer, head: LinearHead | None, path: Path) -> None:
    """Write an ONNX model; weights of more than 2 GB, which it cannot hold, go into PATH.data beside it.

    Its input is `images`; its outputs are `tokens`, `features` and with a head `logits`.
    """
    outputs = ["tokens", "features"] + ["logits"] * (head is not None)
    program = torch.onnx.export(
        _traced(encoder, head), dynamo=True, input_names=["images"], output_names=outputs, verbose=False
    )
    assert program is not None, "only the export without dynamo returns nothing"
    for node in program.model.graph.all_nodes():
        node.metadata_props.clear()  # where in whose files each node was made
    if head is not None:
        program.model.metadata_props["class_names"] = json.dumps(head.names)
    program.save(path)


@torch.no_grad()
def run_onnx(path: Path, images: Tensor) -> tuple[Tensor, Tensor | None]:
    """What ONNX Runtime makes of the file, one image alone and then the others: tokens, and logits if any."""
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    first = [torch.from_numpy(found) for found in session.run(None, {"images": images[:1].numpy()})]
    rest = [torch.from_numpy(found) for found in session.run(None, {"images": images[1:].numpy()})]
    return _tokens_and_logits([torch.cat(pair) for pair in zip(first, rest, strict=True)])


def save_program(encoder: VisionTransformer, head: LinearHead | None, path: Path) -> None:
    """Write what `torch.export.load` reads: `images` to (tokens, features) or (tokens, features, logits)."""
    program = _traced(encoder, head)
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # where in whose files each node was made
    named = {"class_names.json": json.dumps(head.names)} if head is not None else {}
    torch.export.save(program, path, extra_files=named)


@torch.no_grad()
def run_program(path: Path, images: Tensor) -> tuple[Tensor, Tensor | None]:
    """What torch makes of the file, one image alone and then the others: tokens, and logits if any."""
    module: nn.Module = torch.export.load(path).module()
    pairs = zip(module(images[:1]), module(images[1:]), strict=True)
    return _tokens_and_logits([torch.cat(pair) for pair in pairs])


def _traced(encoder: VisionTransformer, head: LinearHead | None) -> torch.export.ExportedProgram:
    channels, (height, width) = encoder.shape.channels, encoder.shape.image_size
    # Two, for a batch of one is taken for a constant.
    images = torch.zeros(2, channels, height, width, dtype=torch.uint8)
    batch = torch.export.Dim("batch", min=1)
    module = PortableEncoder(encoder, head).eval()
    return torch.export.export(module, (images,), dynamic_shapes=({0: batch},), strict=False)


def _tokens_and_logits(found: list[Tensor]) -> tuple[Tensor, Tensor | None]:
    return found[0], found[2] if len(found) > 2 else None
