"""Multi-block masks (I-JEPA, arXiv:2301.08243): predict M blocks from what is left around them."""

import math
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal, get_args

import torch
from torch import Tensor

from fastjepa.masks.blocks import BlockShape, Range, block_shape, smallest_area
from fastjepa.masks.counter import Stream, below, random_words
from fastjepa.masks.random_masks import choose
from fastjepa.masks.rows import asked_rows
from fastjepa.masks.types import Masks
from fastjepa_kernels import choice
from fastjepa_kernels.choice import Way, Ways
from fastjepa_kernels.multiblock import multiblock_masks
from fastjepa_kernels.philox import LOW32

Mode = Literal["truncate", "budget", "packed"]
TRIES = 20  # draws of a context before one more target is let go of
_MOST_BLOCKS = (1 << 12) // TRIES - 1  # a counter has 12 bits for the number of a try
_CALIBRATION_IMAGES, _CALIBRATION_STEPS = 128, 32
_SPREAD = 1.1673039782614187  # the root of x**5 = x + 1; see MultiBlockMasks.budget_tokens


@dataclass(frozen=True)
class MultiBlockMasks:
    """Draws M target blocks and a context block minus the targets, for each image.

    The places of an image are a function of (seed, epoch, image index), the sizes of the blocks of
    (seed, optimizer step): neither workers nor ranks nor a resume can change them.

    Modes differ in what happens to contexts of unequal length:

    - ``truncate``: as published. Every context is cut to the shortest of the images given, keeping the
      first (topmost). Blocks never reach the last row and column, and scale and aspect share a draw.
    - ``budget``: every context has `context_tokens`, every target block `target_tokens`: an unbiased
      choice where there are more. An image with fewer context tokens is drawn again; after 20 tries the
      last target is let go of (no longer kept out of the context, still predicted), and so on.
    - ``packed``: every context token is kept, as a flat stream with `cu_seqlens`.

    Args:
        grid: rows and columns of patches.
        mode: see above.
        seed: any integer.
        context_tokens: K of ``budget``; by default the largest that 95 % of draws reach.
        target_tokens: P of ``budget``; by default the smallest block that can be drawn.
        target_blocks: M.
        target_scale, target_aspect: of a target block: fraction of the grid, height / width.
        context_scale, context_aspect: of the context block.
        min_keep: a context of so few tokens or fewer is drawn again.

    Raises:
        ValueError: if the masks asked for cannot be drawn on this grid.
    """

    grid: tuple[int, int]
    mode: Mode = "truncate"
    seed: int = 0
    context_tokens: int | None = None
    target_tokens: int | None = None
    target_blocks: int = 4
    target_scale: Range = (0.15, 0.2)
    target_aspect: Range = (0.75, 1.5)
    context_scale: Range = (0.85, 1.0)
    context_aspect: Range = (1.0, 1.0)
    min_keep: int = 10

    def __post_init__(self) -> None:
        if self.mode not in get_args(Mode):
            raise ValueError(f"mask mode must be one of {', '.join(get_args(Mode))}, got {self.mode!r}")
        if not 1 <= self.target_blocks <= _MOST_BLOCKS:
            raise ValueError(
                f"there must be at least one target block, at most {_MOST_BLOCKS}, got {self.target_blocks}"
            )
        if self.min_keep < 0:
            raise ValueError(f"min_keep must be 0 or more, got {self.min_keep}")
        if self.mode != "budget" and not (self.context_tokens is None and self.target_tokens is None):
            raise ValueError(
                f"context_tokens and target_tokens belong to mode 'budget'; {self.mode!r} takes all it draws"
            )
        self._check_ranges()
        self._check_grid()

    def _check_ranges(self) -> None:
        for name, (low, high), most in (
            ("target_scale", self.target_scale, 1.0),
            ("target_aspect", self.target_aspect, math.inf),
            ("context_scale", self.context_scale, 1.0),
            ("context_aspect", self.context_aspect, math.inf),
        ):
            if not 0 < low <= high <= most:
                limit = f", at most {most:g}" if most < math.inf else ""
                raise ValueError(
                    f"{name} must be a range (low, high) above 0{limit}, low <= high; got ({low}, {high})"
                )

    def _check_grid(self) -> None:
        rows, columns = self.grid
        smallest_target = self._smallest(self.target_scale, self.target_aspect)
        smallest_context = self._smallest(self.context_scale, self.context_aspect)
        if smallest_target < 1 or smallest_context <= self.min_keep:
            raise ValueError(
                f"these masks cannot be drawn on a grid of {rows} x {columns} patches: target blocks have "
                f"{smallest_target} patches or more (1 needed), context blocks {smallest_context} or more "
                f"(more than min_keep = {self.min_keep} needed). Use a larger image or smaller patches, "
                f"or lower min_keep."
            )
        if self.target_blocks * rows * columns >= 1 << 18:
            raise ValueError(
                f"a grid of {rows} x {columns} patches is too large for {self.target_blocks} target blocks: "
                f"target_blocks * patches must stay below 2**18, the random numbers that an image has"
            )
        for name, tokens, most in (
            ("context_tokens", self.context_tokens, smallest_context),
            ("target_tokens", self.target_tokens, smallest_target),
        ):
            if tokens is not None and not 1 <= tokens <= most:
                raise ValueError(
                    f"{name} must be 1 to {most} on a grid of {rows} x {columns} patches (the smallest block "
                    f"that can be drawn), got {tokens}"
                )

    @property
    def _as_published(self) -> bool:
        return self.mode == "truncate"

    def _smallest(self, scale: Range, aspect: Range) -> int:
        return smallest_area(self.grid, scale, aspect, below_side=self._as_published)

    @cached_property
    def block_tokens(self) -> int:
        """P of ``budget``."""
        return self.target_tokens or self._smallest(self.target_scale, self.target_aspect)

    @cached_property
    def budget_tokens(self) -> int:
        """K of ``budget``: unless given, the largest that 95 % of draws reach, and above min_keep.

        Never more than the smallest context block has: where that is drawn, letting go of every target
        must be enough.
        """
        if self.context_tokens is not None:
            return self.context_tokens
        # The same draws whatever the seed: K is a property of the settings, not of a run.
        probe = replace(self, mode="packed", seed=0, context_tokens=None, target_tokens=None)
        images = torch.arange(_CALIBRATION_STEPS * _CALIBRATION_IMAGES).split(_CALIBRATION_IMAGES)
        lengths = []
        for step, batch in enumerate(images):
            # Sizes matter most, and a few random ones would be a poor sample. Multiples of the powers of
            # 1 / _SPREAD are spread evenly over the four-dimensional unit cube.
            spread = [(0.5 + step * _SPREAD**-power) % 1 for power in (1, 2, 3, 4)]
            masks = probe._sample(batch, 0, probe._shapes(spread))
            assert masks.cu_seqlens is not None, "packed"
            lengths.append(masks.cu_seqlens.diff())
        reached = torch.cat(lengths).sort().values
        reached_by_most = int(reached[int(0.05 * reached.numel())])
        smallest_context = self._smallest(self.context_scale, self.context_aspect)
        return min(max(reached_by_most, self.min_keep + 1), smallest_context)

    def block_shapes(self, step: int) -> tuple[BlockShape, BlockShape]:
        """The target and the context block of an optimizer step: the same for all images and ranks."""
        words = random_words(self.seed, Stream.BLOCK_SIZES, torch.tensor([step]), 0, 4).tolist()[0]
        return self._shapes([word * 2.0**-32 for word in words])  # as `uniform`, without three ops of torch

    def _shapes(self, draws: list[float]) -> tuple[BlockShape, BlockShape]:
        """The target and the context block that four numbers in [0, 1) give."""
        published = self._as_published

        def shape(scale: Range, aspect: Range, first: float, second: float) -> BlockShape:
            r_aspect = first if published else second
            return block_shape(self.grid, scale, aspect, first, r_aspect, below_side=published)

        target = shape(self.target_scale, self.target_aspect, draws[0], draws[1])
        context = shape(self.context_scale, self.context_aspect, draws[2], draws[3])
        return target, context

    def sample(self, image_index: Tensor, epoch: int = 0, step: int = 0) -> Masks:
        """Masks for the images at `image_index` [B], on its device; with `asked_rows` if that is the CPU.

        Args:
            image_index: int64 [B], the images' numbers in their data set.
            epoch: places differ from one epoch to the next.
            step: the optimizer step, which fixes the sizes of the blocks.

        Raises:
            ValueError: no image, or an epoch or, on the CPU, an image's number outside 0..2**32-1.
        """
        if image_index.ndim != 1 or image_index.numel() == 0:
            raise ValueError(f"image_index must be [B] with B > 0, got {list(image_index.shape)}")
        masks = self._sample(image_index, epoch, self.block_shapes(step))
        if masks.targets.device.type != "cpu":  # to count there would be to wait
            return masks
        rows, places = asked_rows(masks.targets, self.grid[0] * self.grid[1], fixed=self.mode == "budget")
        return replace(masks, asked_rows=rows, asked_places=places)

    def _sample(self, image_index: Tensor, epoch: int, shapes: tuple[BlockShape, BlockShape]) -> Masks:
        return _WAYS(choice.preference(), image_index.device, self, image_index, epoch, shapes)

    def _native(self, image_index: Tensor, epoch: int, shapes: tuple[BlockShape, BlockShape]) -> Masks:
        tokens = (self.budget_tokens, self.block_tokens) if self.mode == "budget" else (0, 0)
        target, context = ((shape.height, shape.width) for shape in shapes)
        return Masks(
            *multiblock_masks(
                image_index.long(),
                (self.seed & LOW32, (self.seed >> 32) & LOW32),
                epoch,
                self.grid,
                target,
                context,
                self.target_blocks,
                self.min_keep,
                self.mode,
                *tokens,
            )
        )

    def _reference(self, image_index: Tensor, epoch: int, shapes: tuple[BlockShape, BlockShape]) -> Masks:
        draw = self._draw(image_index, epoch, shapes)
        target = shapes[0]
        allowed = draw.allowed.flatten(1)  # [B, N]
        lengths = allowed.sum(dim=1)  # [B]

        if self.mode == "budget":
            words = random_words(self.seed, Stream.CONTEXT_TOKENS, image_index, epoch, allowed.shape[1])
            kept = self._choose_target_tokens(image_index, epoch, draw.target_index(target, self.grid))
            return Masks(choose(words, allowed, self.budget_tokens), kept)
        targets = draw.target_index(target, self.grid)  # [M, B, h w]
        if self.mode == "packed":
            starts = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)]).int()  # [B + 1]
            return Masks(allowed.nonzero()[:, 1], targets, starts)
        # Sorting "not allowed" last keeps the allowed places in ascending order.
        order = allowed.logical_not().to(torch.uint8).argsort(dim=1, stable=True)  # [B, N]
        return Masks(order[:, : int(lengths.min())], targets)

    def _choose_target_tokens(self, image_index: Tensor, epoch: int, targets: Tensor) -> Tensor:
        blocks, batch, area = targets.shape
        if area == self.block_tokens:
            return targets
        words = random_words(self.seed, Stream.TARGET_TOKENS, image_index, epoch, blocks * area)
        words = words.view(batch, blocks, area).transpose(0, 1)  # [M, B, h w]
        places = choose(words, torch.ones_like(words, dtype=torch.bool), self.block_tokens)
        return targets.gather(2, places)

    def _draw(self, image_index: Tensor, epoch: int, shapes: tuple[BlockShape, BlockShape]) -> "_Draw":
        """Draw places until every image has a context that is long enough.

        What is drawn again: the context block alone, as published, in ``truncate``; the whole image
        otherwise, so that a target is hardly ever let go of.
        """
        target, context = shapes
        needed = self.min_keep + 1
        if self.mode == "budget":
            needed = max(needed, self.budget_tokens)
        draw = self._draw_once(image_index, epoch, shapes, attempt=0, kept_out=self.target_blocks)
        pending = (draw.allowed.flatten(1).sum(1) < needed).nonzero().flatten()  # [b]
        for attempt in range(1, TRIES * (self.target_blocks + 1)):
            if pending.numel() == 0:
                break
            kept_out = self.target_blocks - attempt // TRIES
            again = self._draw_once(image_index[pending], epoch, shapes, attempt, kept_out)
            draw.put(pending, again)
            pending = pending[again.allowed.flatten(1).sum(1) < needed]
        return draw

    def _draw_once(
        self,
        image_index: Tensor,
        epoch: int,
        shapes: tuple[BlockShape, BlockShape],
        attempt: int,
        kept_out: int,
    ) -> "_Draw":
        target, context = shapes
        targets_attempt = 0 if self._as_published else attempt
        corners = self._corners(
            Stream.TARGET_PLACES, image_index, epoch, target, self.target_blocks, targets_attempt
        )
        context_corner = self._corners(Stream.CONTEXT_PLACES, image_index, epoch, context, 1, attempt)
        covered = inside(corners[:, :kept_out], target, self.grid).any(dim=1)  # [B, rows, columns]
        allowed = inside(context_corner, context, self.grid)[:, 0] & ~covered
        return _Draw(corners, allowed)

    def _corners(
        self, stream: Stream, image_index: Tensor, epoch: int, shape: BlockShape, count: int, attempt: int
    ) -> Tensor:
        """Top-left corners: int64 [B, count, 2]. The published draw leaves the last place out."""
        words = random_words(self.seed, stream, image_index, epoch, 2 * count, attempt).view(-1, count, 2)
        last = 0 if self._as_published else 1
        top = below(words[..., 0], self.grid[0] - shape.height + last)
        left = below(words[..., 1], self.grid[1] - shape.width + last)
        return torch.stack([top, left], dim=-1)


_WAYS = Ways(
    "multiblock_masks", Way("cpp", MultiBlockMasks._native), Way("torch", MultiBlockMasks._reference)
)


@dataclass
class _Draw:
    """Corners of the target blocks, int64 [B, M, 2], and where the context is, bool [B, rows, columns]."""

    corners: Tensor
    allowed: Tensor

    def put(self, rows: Tensor, other: "_Draw") -> None:
        self.corners[rows] = other.corners
        self.allowed[rows] = other.allowed

    def target_index(self, shape: BlockShape, grid: tuple[int, int]) -> Tensor:
        """Patch positions of the target blocks: int64 [M, B, h w], ascending."""
        device = self.corners.device
        row = torch.arange(shape.height, device=device)[:, None] * grid[1]
        cells = (row + torch.arange(shape.width, device=device)).flatten()  # [h w]
        first = self.corners[..., 0] * grid[1] + self.corners[..., 1]  # [B, M]
        return (first[..., None] + cells).transpose(0, 1).contiguous()


def inside(corners: Tensor, shape: BlockShape, grid: tuple[int, int]) -> Tensor:
    """Which patches a block at each corner covers: [..., 2] to bool [..., rows, columns]."""
    row = torch.arange(grid[0], device=corners.device)
    column = torch.arange(grid[1], device=corners.device)
    top, left = corners[..., 0, None], corners[..., 1, None]
    rows = (row >= top) & (row < top + shape.height)
    columns = (column >= left) & (column < left + shape.width)
    return rows[..., :, None] & columns[..., None, :]
