"""What a step keeps of its tokens between the forward and the backward pass, in bytes.

A fused block keeps of T tokens of width D what `fastjepa_kernels.block` says: the residual stream twice,
queries, keys and values, the attention's output and fc1's output, 6 + mlp_ratio widths; the outputs of two
norms and of GELU besides, 2 + mlp_ratio more, where they are not made again: on a CPU, and wherever the plain
modules run.
"""

from dataclasses import dataclass

from fastjepa.planning.networks import Network
from fastjepa.planning.tokens import Tokens

FULL = 4  # bytes of fp32
STATISTIC = 4  # bytes: means, reciprocal deviations and the attention's log-sum-exp are fp32
NUMBER = 2  # bytes of bf16
INDEX = 8  # bytes of an int64
NARROW_RATIO = 4.0  # of the predictor's MLP


@dataclass(frozen=True)
class Kept:
    """How blocks keep.

    Attributes:
        remade: outputs of norms and of GELU are made again in the backward pass, as the fused blocks do on a
            GPU.
        checkpointed: with `speed.checkpoint_blocks`: of each block its inputs alone.
    """

    remade: bool = True
    checkpointed: bool = False


def block_bytes(width: int, heads: int, ratio: float, rows: float, after: float, kept: Kept) -> float:
    """Of one block.

    Args:
        width, heads, ratio: of it.
        rows: tokens that come in.
        after: tokens that go on after its attention.
    """
    # The stream, qkv and the attention's output; the sum y and the MLP's hidden layer.
    wide = 5 * rows + (1 + ratio) * after
    if after != rows:
        wide += after  # the attention's rows that go on are copies
    if not kept.remade:
        wide += rows + (1 + ratio) * after
    return NUMBER * width * wide + STATISTIC * ((2 + heads) * rows + 2 * after)


def stack_bytes(
    width: int, heads: int, ratio: float, depth: int, rows: float, after_last: float, kept: Kept
) -> float:
    """Of `depth` blocks in a row, of whose last `after_last` rows are wanted."""
    if kept.checkpointed:  # the stream and what is to be added to it, which nothing is for the first block
        return NUMBER * width * rows * (2 * depth - 1)
    whole = block_bytes(width, heads, ratio, rows, rows, kept)
    return (depth - 1) * whole + block_bytes(width, heads, ratio, rows, after_last, kept)


def norm_and_linear_bytes(width: int, rows: float) -> float:
    """Of a final norm its input, and of the linear layer behind it the norm's output."""
    return rows * (2 * NUMBER * width + 2 * STATISTIC)


def encoder_rows(network: Network, tokens: Tokens) -> float:
    """Of the context encoder: with a class token for each image, if there is one."""
    return tokens.context + tokens.images * network.shape.class_token


def encoder_bytes(network: Network, tokens: Tokens, kept: Kept) -> float:
    """Of the context encoder, with its patches."""
    shape, rows = network.shape, encoder_rows(network, tokens)
    pixels = NUMBER * tokens.context * network.patch_pixels
    blocks = stack_bytes(shape.width, shape.heads, shape.mlp_ratio, shape.depth, rows, rows, kept)
    return pixels + blocks + norm_and_linear_bytes(shape.width, rows)


def predictor_bytes(network: Network, tokens: Tokens, kept: Kept) -> float:
    """Of the predictor and the loss."""
    narrow, heads = network.predictor, network.predictor_heads
    rows, stream, asked = tokens.context, tokens.stream, tokens.asked
    blocks = stack_bytes(narrow.width, heads, NARROW_RATIO, narrow.depth, stream, asked, kept)
    # The first block's norm sees each token of the context once; then they are spread.
    inputs = NUMBER * narrow.width * (1 if kept.remade or kept.checkpointed else 2)
    blocks -= (stream - rows - asked) * (inputs + 2 * STATISTIC * (not kept.checkpointed))
    loss = (
        2 * NUMBER * network.shape.width * asked
    )  # the prediction, and the slope that its gradient is made of
    return blocks + norm_and_linear_bytes(narrow.width, asked) + loss + INDEX * (rows + 3 * asked)


def decoder_rows(network: Network, tokens: Tokens) -> int:
    """Of MAE's decoder: all patches of each image and its class token."""
    return tokens.images * (network.patches + 1)


def decoder_bytes(network: Network, tokens: Tokens, kept: Kept) -> float:
    """Of MAE's decoder and the loss, which sees hidden patches alone and in fp32."""
    narrow, rows = network.predictor, decoder_rows(network, tokens)
    blocks = stack_bytes(narrow.width, network.predictor_heads, NARROW_RATIO, narrow.depth, rows, rows, kept)
    # Of every patch the prediction, and the decoder's output once more without the class tokens; of hidden
    # ones the prediction that was gathered, what it is compared with, and their squares: mse_loss resizes its
    # result to a scalar and keeps the memory.
    of_patches = NUMBER * (network.patch_pixels + narrow.width) * tokens.images * network.patches
    loss = 3 * FULL * network.patch_pixels * tokens.asked
    return blocks + norm_and_linear_bytes(narrow.width, rows) + of_patches + loss


def forward_bytes(network: Network, tokens: Tokens, kept: Kept) -> float:
    """Alive at the end of the forward pass, of which the backward pass frees all but the prediction."""
    head = decoder_bytes if network.is_mae else predictor_bytes
    return encoder_bytes(network, tokens, kept) + head(network, tokens, kept)


def left_bytes(network: Network, tokens: Tokens, kept: Kept, bucket: int) -> float:
    """Alive when the gradients of the last `bucket` parameters are there: of the encoder's other blocks."""
    of_predictor = network.parameters - network.encoder_parameters
    done = min(network.shape.depth, max(0, bucket - of_predictor) // network.block_parameters)
    return encoder_bytes(network, tokens, kept) * (1 - done / network.shape.depth)


def backward_bytes(network: Network, tokens: Tokens, kept: Kept) -> float:
    """Beside what is kept, the most that one block's backward pass has in hand at a time.

    The gradients of the MLP's hidden layer and of its output and the stream, and GELU's output made again;
    with checkpointing a block's own activations besides.
    """

    def block(width: int, heads: int, ratio: float, rows: float) -> float:
        again = (1 + ratio) if kept.remade else 0.0
        inside = block_bytes(width, heads, ratio, rows, rows, kept) if kept.checkpointed else 0.0
        return NUMBER * width * rows * (4 + ratio + again) + inside

    shape, narrow = network.shape, network.predictor
    stream = decoder_rows(network, tokens) if network.is_mae else tokens.stream
    return max(
        block(shape.width, shape.heads, shape.mlp_ratio, encoder_rows(network, tokens)),
        block(narrow.width, network.predictor_heads, NARROW_RATIO, stream),
    )


def target_bytes(network: Network, tokens: Tokens) -> float:
    """The most that the target encoder's forward pass has in hand: a block's MLP, and what it is added to."""
    shape = network.shape
    rows = tokens.images * network.patches
    return NUMBER * shape.width * rows * (3 + 2 * shape.mlp_ratio)
