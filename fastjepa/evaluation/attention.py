"""Where an encoder looks: the attention of its last block."""

import torch
from torch import Tensor

from fastjepa.evaluation.showing import Attended
from fastjepa.models import VisionTransformer


@torch.no_grad()
def last_attention(encoder: VisionTransformer, images: Tensor) -> Tensor:
    """The attention of the last block, as queries x keys for each head.

    Args:
        encoder: of any depth above 0.
        images: [n, C, H, W] uint8, or floating point and already normalised.

    Returns:
        fp32 [n, heads, L, L], each row with the sum 1. L counts patches and a class token, which comes first.
    """
    x, sequences = encoder.embed(images)  # [T, D]
    x, delta = encoder.blocks[:-1].run(x, sequences)
    block = encoder.blocks.blocks()[-1]
    _, qkv = block.begin(x, delta)  # [T, 3 D]
    heads = block.attn.heads
    parts = qkv.view(sequences.count, sequences.max_seqlen, 3, heads, -1).float()  # [n, L, 3, H, d]
    q, k, _ = parts.permute(2, 0, 3, 1, 4)  # [n, H, L, d] each
    return (q @ k.mT * q.shape[-1] ** -0.5).softmax(dim=-1)


def attended(encoder: VisionTransformer, images: Tensor) -> Attended:
    """What of the last block's attention is worth a picture.

    Without a class token there is no query that stands for an image. Shown are a patch that is chosen without
    a look at the image, the one right below and to the right of the middle, and the mean over all patches.
    """
    down, across = encoder.shape.grid
    place, first = down // 2 * across + across // 2, int(encoder.shape.class_token)
    from_patch, received, from_class = [], [], []
    for image in images.split(1):  # of many patches and heads it is large
        (attention,) = last_attention(encoder, image)  # [H, L, L]
        share = attention[..., first:] * attention.shape[-1]  # [H, L, N], 1 if all tokens had the same
        from_patch.append(share[:, first + place])
        received.append(share[:, first:].mean(dim=1))
        from_class.append(share[: attention.shape[0] * first, 0])
    return Attended(
        from_patch=torch.stack(from_patch).half(),
        received=torch.stack(received).half(),
        from_class=torch.stack(from_class).half(),
        place=torch.tensor(place),
    )
