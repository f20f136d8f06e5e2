"""Blocks one after another, and how they are run."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, cast, overload

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fastjepa.models.block import Block, add_norm
from fastjepa.models.sequences import Sequences


class Stack(nn.ModuleList):
    """Transformer blocks in a row; in a state dict it is the list that it is.

    Args:
        width, heads, mlp_ratio: of each block.
        depth: how many.

    Attributes:
        recompute: backward computes each block's insides again, to save memory.
        lend: has the weights of the block of a number there while that block runs, without a gradient. None
            where they always are.
        is_fused: see `Block`.
    """

    def __init__(self, depth: int, width: int, heads: int, mlp_ratio: float = 4.0) -> None:
        super().__init__(Block(width, heads, mlp_ratio) for _ in range(depth))
        self.recompute = False
        self.lend: Callable[[int], AbstractContextManager[None]] | None = None

    @overload
    def __getitem__(self, idx: slice) -> "Stack": ...

    @overload
    def __getitem__(self, idx: int) -> nn.Module: ...

    def __getitem__(self, idx: int | slice) -> nn.Module:
        """A block; of a slice a stack of the same blocks."""
        if not isinstance(idx, slice):
            return super().__getitem__(idx)
        part = Stack(0, 0, 0)
        part.extend(self.blocks()[idx])
        part.recompute, part.training = self.recompute, self.training
        return part

    def blocks(self) -> list[Block]:
        return cast(list[Block], list(self))

    @property
    def is_fused(self) -> bool:
        return all(block.is_fused for block in self.blocks())

    @is_fused.setter
    def is_fused(self, value: bool) -> None:
        for block in self.blocks():
            block.is_fused = value

    def compile_blocks(self, **options: Any) -> None:
        """Have each part of each block compiled, as one graph for any number of tokens.

        One compiled part serves the blocks of a stack, whose shapes are alike: there are a few compilations
        for each stack, in training and in evaluation, whatever lengths the masks have. Copies and pickles of
        the stack are not compiled.
        """
        self.is_fused = False
        for block in self.blocks():
            block.compile_parts(fullgraph=True, dynamic=True, **options)

    def run(
        self,
        x: Tensor,
        sequences: Sequences,
        rows: Tensor | None = None,
        spread: Callable[[Tensor], Tensor] | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """A stream through the blocks.

        Args:
            x: [T, D].
            sequences: how it is cut.
            rows: int64 [R], distinct rows that alone are wanted: the last block goes on with them after its
                attention. None for all.
            spread: in the first block, between its two parts; see `Block.forward`.

        Returns:
            y and what is to be added to it (None without a block): [T, D], or [R, D] with `rows`.
        """
        delta: Tensor | None = None
        again = self.recompute and torch.is_grad_enabled()
        for number, block in enumerate(self.blocks()):
            wanted = rows if number == len(self) - 1 else None
            # Called as a module and with tensors alone by position: hooks of blocks see what they need to.
            step = partial(block, sequences=sequences, rows=wanted, spread=spread if number == 0 else None)
            with nullcontext() if self.lend is None else self.lend(number):
                x, delta = checkpoint(step, x, delta, use_reentrant=False) if again else step(x, delta)
        return x, delta

    def finish(self, norm: nn.LayerNorm, x: Tensor, delta: Tensor | None) -> Tensor:
        """norm(x + delta), of what `run` returned."""
        return add_norm(norm, x, delta, self.is_fused)
