"""Floating-point operations of a training step, from shapes alone.

Two for each multiply-add, of matrix products alone, as torch.utils.flop_counter counts and as the ops of
`fastjepa_kernels` register. A Linear costs its forward pass twice again in backward: for its input and for
its weight; the patch embedding, whose input has no gradient, once. Attention costs 4 L² D forward, and
10 L² D backward, where its scores are computed again.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from fastjepa.models.vit import ViTShape


@dataclass(frozen=True)
class Pass:
    """FLOPs of a part of a step."""

    forward: float = 0.0
    backward: float = 0.0

    def __add__(self, other: "Pass") -> "Pass":
        return Pass(self.forward + other.forward, self.backward + other.backward)

    @property
    def total(self) -> float:
        return self.forward + self.backward


Parts = Mapping[str, Pass]
NO_GRADIENT = ("target patch embedding", "target encoder")


@dataclass(frozen=True)
class Narrow:
    """A predictor's or a decoder's shape; its MLP is four times its width."""

    width: int
    depth: int


@dataclass(frozen=True)
class Tokens:
    """What a step of I-JEPA sees. Means may be given for numbers that change.

    Attributes:
        context: context tokens of each image, K.
        target: tokens of a target block, P.
        blocks: target blocks of an image, M.
    """

    context: Sequence[float]
    target: float
    blocks: int = 4

    @property
    def images(self) -> int:
        return len(self.context)

    @property
    def asked(self) -> float:
        """Predicted tokens, M B P."""
        return self.blocks * self.images * self.target


@dataclass(frozen=True)
class Skipped:
    """Without the dead work (`speed.skip_dead_work`), results being the same.

    Attributes:
        target_rows: tokens of all images for which the target encoder's last block computes its projection
            and MLP: the union of the target blocks, or M B P with repeats.
    """

    target_rows: float


def ijepa(shape: ViTShape, predictor: Narrow, tokens: Tokens, skipped: Skipped | None = None) -> Parts:
    """A step of I-JEPA, part by part: with every block in full, or without what nobody reads.

    Args:
        shape: of both encoders.
        predictor: shape of the predictor.
        tokens: counts of a batch.
        skipped: None for full blocks everywhere.
    """
    patches = shape.grid[0] * shape.grid[1]
    seen, every = sum(tokens.context), float(patches * tokens.images)
    target_rows = every if skipped is None else skipped.target_rows
    target = _stack(shape.width, shape.depth, shape.mlp_ratio, every, every * patches, target_rows)
    context = _stack(shape.width, shape.depth, shape.mlp_ratio, seen, sum(k * k for k in tokens.context))
    embedding = _linear(1, shape.channels * shape.patch_size**2, shape.width).forward
    return {
        "patch embedding": Pass(seen * embedding, seen * embedding),
        "context encoder": context,
        "target patch embedding": Pass(every * embedding),
        "target encoder": Pass(target.forward),
        "predictor": _predictor(shape.width, predictor, tokens, skipped is not None),
        "loss": Pass(),
    }


def mae(shape: ViTShape, decoder: Narrow, images: int, kept: int) -> Parts:
    """A step of MAE that embeds the `kept` patches of an image alone, as ours does."""
    patches = shape.grid[0] * shape.grid[1]
    pixels = shape.channels * shape.patch_size**2
    seen, every = images * (kept + 1), images * (patches + 1)  # with the class token
    embedding = _linear(images * kept, pixels, shape.width).forward
    ends = _linear(seen, shape.width, decoder.width) + _linear(images * patches, decoder.width, pixels)
    return {
        "patch embedding": Pass(embedding, embedding),
        "context encoder": _stack(shape.width, shape.depth, shape.mlp_ratio, seen, seen * (kept + 1)),
        "decoder": ends + _stack(decoder.width, decoder.depth, 4.0, every, every * (patches + 1)),
        "loss": Pass(),
    }


def useful(parts: Parts) -> float:
    """FLOPs that a step has to do: three times the forward pass of what is trained, once that of what is not.

    Of the parts with full blocks. By it one compares: what an implementation saves or computes again is its
    own affair, and shows in the time.
    """
    return sum(part.forward * (1 if name in NO_GRADIENT else 3) for name, part in parts.items())


def executed(parts: Parts) -> float:
    """FLOPs of the matrix products that a step runs, as a counter counts them."""
    return sum(part.total for part in parts.values())


def _linear(rows: float, inputs: int, outputs: int) -> Pass:
    forward = 2.0 * rows * inputs * outputs
    return Pass(forward, 2 * forward)


def _attention(width: int, squares: float) -> Pass:
    """Of sequences whose squared lengths sum up to `squares`, over all heads."""
    return Pass(4.0 * width * squares, 10.0 * width * squares)


def _after_attention(width: int, mlp_ratio: float, rows: float) -> Pass:
    hidden = round(width * mlp_ratio)
    return _linear(rows, width, width) + _linear(rows, width, hidden) + _linear(rows, hidden, width)


def _stack(
    width: int, depth: int, mlp_ratio: float, rows: float, squares: float, last_rows: float | None = None
) -> Pass:
    """`depth` blocks over `rows` tokens; the last projects and has an MLP for `last_rows` of them."""
    attention = _linear(rows, width, 3 * width) + _attention(width, squares)
    total = Pass()
    for block in range(depth):
        after = last_rows if last_rows is not None and block == depth - 1 else rows
        total += attention + _after_attention(width, mlp_ratio, after)
    return total


def _predictor(encoder_width: int, shape: Narrow, tokens: Tokens, skipped: bool) -> Pass:
    width, seen, asked = shape.width, sum(tokens.context), tokens.asked
    rows = tokens.blocks * seen + asked
    squares = tokens.blocks * sum((k + tokens.target) ** 2 for k in tokens.context)
    blocks = _stack(width, shape.depth, 4.0, rows, squares, asked if skipped else None)
    if skipped:  # the first queries, keys and values of the context once, not for each block of positions
        again = _linear((tokens.blocks - 1) * seen, width, 3 * width)
        blocks += Pass(-again.forward, -again.backward)
    return _linear(seen, encoder_width, width) + blocks + _linear(asked, width, encoder_width)
