"""Features of several depths from one forward pass."""

import torch
from torch import Tensor

from fastjepa.models import VisionTransformer


@torch.no_grad()
def last_blocks(encoder: VisionTransformer, images: Tensor, count: int) -> list[Tensor]:
    """Patch tokens after each of the last `count` blocks, each through the encoder's final norm.

    The last of them is what `encoder(images)` gives; a class token is left out.

    Args:
        encoder: whose depth is at least `count`.
        images: [B, C, H, W] uint8, or floating point and already normalised.

    Returns:
        `count` times [B, N, D], the last block last.

    Raises:
        ValueError: the encoder has fewer blocks.
    """
    depth = len(encoder.blocks)
    if not 1 <= count <= depth:
        raise ValueError(
            f"the last {count} blocks of an encoder of depth {depth}: ask for 1 to {depth} of them"
        )
    first = int(encoder.shape.class_token)
    x, sequences = encoder.embed(images)  # [T, D]
    found = []
    begin = 0
    for end in range(depth - count + 1, depth + 1):
        x, delta = encoder.blocks[begin:end].run(x, sequences)
        tokens = encoder.blocks.finish(encoder.norm, x, delta)  # [T, D]
        found.append(tokens.view(sequences.count, sequences.max_seqlen, -1)[:, first:])
        if delta is not None:
            x = x + delta
        begin = end
    return found
