"""What the parts of a step would take at the measured rates of a large matrix product and of a copy.

A part's matrix products at the GEMM's rate, and after them everything else at the copy's: nothing overlaps,
no launch costs anything, and no matrix is too small to fill the device. What a part takes above this is to be
won.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from fastjepa.models import ViTShape
from fastjepa.models.flops import Narrow, Skipped, Tokens, ijepa


@dataclass(frozen=True)
class Pass:
    """Of a fused block, a pass outside its matrix products; each tensor is moved once.

    Attributes:
        times: in a block.
        moved: tensors as wide as a token, in and out.
        hidden: whether they are as wide as the MLP's hidden layer instead.
    """

    times: int
    moved: tuple[str, ...]
    hidden: bool = False


# As on a GPU, where `fastjepa_kernels.block` makes outputs of norms and of GELU once more on the way back.
FORWARD = {
    "sum and norm": Pass(2, ("x", "delta", "total", "normed")),
    "attention": Pass(1, ("q", "k", "v", "out")),
    "GELU": Pass(1, ("hidden", "active"), hidden=True),
}
BACKWARD = {
    "sum and norm": Pass(2, ("grad", "through", "total", "dx", "normed")),
    "attention": Pass(1, ("q", "k", "v", "out", "grad", "dq", "dk", "dv")),
    "GELU": Pass(1, ("grad", "hidden", "dhidden", "active"), hidden=True),
    "gradient of qkv's bias": Pass(1, ("dq", "dk", "dv")),  # the other sums are taken on the way
}


def widths(passes: Mapping[str, Pass], mlp_ratio: float) -> float:
    """Elements that a block moves outside its matrix products, in widths of a token."""
    return sum(each.times * len(each.moved) * (mlp_ratio if each.hidden else 1.0) for each in passes.values())


_NARROW_RATIO = 4.0  # of a predictor's MLP
_LOSS_BYTES = 6  # for an element of the prediction in 16 bit: prediction, target, gradient
_FP32 = 4


@dataclass(frozen=True)
class Rates:
    """Measured in the same run; a copy's bytes are those read and those written together."""

    flop_per_s: float
    bytes_per_s: float


@dataclass(frozen=True)
class Cost:
    """Of a part: what has to be computed and moved."""

    flop: float = 0.0
    bytes_moved: float = 0.0

    def seconds(self, rates: Rates) -> float:
        return self.flop / rates.flop_per_s + self.bytes_moved / rates.bytes_per_s


def costs(
    shape: ViTShape,
    predictor: Narrow,
    tokens: Tokens,
    skipped: Skipped | None,
    *,
    element_bytes: int,
    encoder_parameters: int,
    predictor_parameters: int,
    averages_apart: bool,
) -> Mapping[str, Cost]:
    """Of the parts of `stopwatch.PARTS`, for a step of I-JEPA.

    Args:
        shape, predictor, tokens, skipped: as for `ijepa`.
        element_bytes: of the precision that the networks compute in.
        encoder_parameters, predictor_parameters: of one encoder, and of the predictor.
        averages_apart: the target encoder moves in a pass of its own.
    """
    flop = ijepa(shape, predictor, tokens, skipped)
    seen, every = sum(tokens.context), tokens.images * shape.grid[0] * shape.grid[1]
    pixels, e = shape.channels * shape.patch_size**2, element_bytes
    rows = tokens.blocks * seen + tokens.asked
    weights = encoder_parameters + predictor_parameters

    def patches(count: float) -> float:
        # uint8 pixels to patches; their embedding and positions are read, the sum is written.
        return count * (pixels * (1 + e) + 3 * shape.width * e)

    def blocks(count: float, network: ViTShape | Narrow, passes: Mapping[str, Pass]) -> float:
        ratio = network.mlp_ratio if isinstance(network, ViTShape) else _NARROW_RATIO
        return count * network.width * network.depth * widths(passes, ratio) * e

    # Masters, two moments: read and written; the gradient twice, once for its norm; the weights.
    optimizer = weights * (6 * _FP32 + 3 * e)
    average = encoder_parameters * (2 * _FP32 + e)
    return {
        "target patches": Cost(flop["target patch embedding"].forward, patches(every)),
        "target encoder": Cost(flop["target encoder"].forward, blocks(every, shape, FORWARD)),
        "context patches": Cost(flop["patch embedding"].forward, patches(seen)),
        "context encoder": Cost(flop["context encoder"].forward, blocks(seen, shape, FORWARD)),
        "predictor": Cost(flop["predictor"].forward, blocks(rows, predictor, FORWARD)),
        "loss": Cost(0.0, tokens.asked * shape.width * _LOSS_BYTES * e / 2),
        "predictor backward": Cost(flop["predictor"].backward, blocks(rows, predictor, BACKWARD)),
        "context backward": Cost(
            flop["context encoder"].backward + flop["patch embedding"].backward,
            # Gradients are copied into one flat tensor.
            blocks(seen, shape, BACKWARD) + 2 * weights * e,
        ),
        "optimizer": Cost(0.0, optimizer + (0 if averages_apart else average)),
        "average": Cost(0.0, average + encoder_parameters * _FP32 if averages_apart else 0.0),
    }
