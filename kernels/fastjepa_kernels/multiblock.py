"""multiblock_masks: the multi-block masks of I-JEPA (arXiv:2301.08243), drawn by the optional extension.

What a training step cannot wait for, at a microsecond for an image: places, the tries of a context that is
too short, and lists of patches. How large blocks are, and which settings make sense, is decided above it.
"""

import torch
from torch import Tensor


def multiblock_masks(
    image_index: Tensor,
    key: tuple[int, int],
    epoch: int,
    grid: tuple[int, int],
    target: tuple[int, int],
    context: tuple[int, int],
    target_blocks: int,
    min_keep: int,
    mode: str,
    context_tokens: int = 0,
    target_tokens: int = 0,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Target blocks, and a context block without them, for each image; needs the extension.

    A function of (key, epoch, image index): neither the batch nor the number of threads changes what an
    image gets. Counters and rules are those of fastjepa.masks.MultiBlockMasks, so that it can be the
    reference of this.

    Args:
        image_index: int64 [B] on the CPU, B > 0, each below 2**32.
        key: of the counter-based generator: a seed's low and high 32 bits.
        epoch: below 2**32.
        grid: rows and columns of patches, fewer than 2**18 patches.
        target, context: rows and columns of a target block and of the context block.
        target_blocks: M, at most 203.
        min_keep: a context of so few tokens or fewer is drawn again: after each 20 tries with one target
            fewer kept out of it.
        mode: "truncate" cuts contexts to the shortest and leaves out the last row and column, as published;
            "budget" chooses among the tokens of each list; "packed" keeps them all.
        context_tokens, target_tokens: K and P of budget, else 0.

    Returns:
        context: int64 [B, K], or [T] if packed; targets: int64 [M, B, P]; ascending positions, row by row;
        cu_seqlens: int32 [B + 1] if packed, else None.

    Raises:
        ValueError: a block does not fit into the grid, or has fewer tokens than are to be kept; an image
            index or an epoch is out of range.
    """
    chosen, targets, cu_seqlens = torch.ops.fastjepa_native.multiblock_masks(
        image_index,
        key,
        epoch,
        grid,
        target,
        context,
        target_blocks,
        min_keep,
        mode,
        context_tokens,
        target_tokens,
    )
    return chosen, targets, cu_seqlens if mode == "packed" else None
