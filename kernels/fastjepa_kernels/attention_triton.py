"""What the Triton kernels of packed_attention share: tiles by shape and device, and blocks of a head's rows.

Rows past the last sequence are a sequence of their own in every grid, number S: its programs fill them with
zeros, so nobody on the host has to know where the stream ends. A program of a block that its sequence does
not reach leaves at once. cu_seqlens is read on the device, and kept inside the stream whatever it says.

Strides come in units of 8 elements: the compiler then knows that a head's rows start on 16 bytes (of 2-byte
elements) whatever the head dim, and moves them in vectors. Within a sequence a program counts elements in
int32 from a pointer moved there in int64.
"""

from dataclasses import dataclass

from torch import Tensor

from fastjepa_kernels.language import tl, triton

# These change from step to step; one compiled kernel serves all of their values.
CHANGING = ["tokens", "sequences", "blocks"]
_ROW_LIMIT = 2**23  # elements between rows; 256 rows of less stay within int32


@dataclass(frozen=True)
class Tile:
    """Queries × keys of one product of scores, and what a program has for it.

    Attributes:
        registers: of a thread, at most; no limit by default.
    """

    queries: int
    keys: int
    num_warps: int
    num_stages: int = 1
    registers: int | None = None

    @property
    def launch(self) -> dict[str, int]:
        options = {"num_warps": self.num_warps, "num_stages": self.num_stages}
        return options if self.registers is None else options | {"maxnreg": self.registers}


def padded_head_dim(head_dim: int) -> int:
    """What a kernel computes with: a power of two that matrix instructions take."""
    return max(16, 1 << (head_dim - 1).bit_length())


LONG = 4096  # tokens, more than are held whole


def _keys_held(max_seqlen: int) -> int:
    return max(64, 1 << (max_seqlen - 1).bit_length())


def _family(architecture: int) -> int:
    """80, 90, 100 or 942: the matrix instructions and registers that a tile is made for.

    90 and 100 have instructions of their own (wgmma, tcgen05); whatever else NVIDIA makes has those of 80.
    The interpreter gets 90.
    """
    if architecture // 100 >= 9 or architecture in (906, 908):
        return 942
    return {0: 90, 9: 90, 10: 100}.get(architecture // 10, 80)


def forward_tile(head_dim: int, max_seqlen: int, architecture: int, element_size: int) -> tuple[Tile, bool]:
    """For the forward kernel, and whether that is forward_whole.

    As are all tiles here, chosen so that no thread keeps values in local memory.
    """
    width, family, keys = padded_head_dim(head_dim), _family(architecture), _keys_held(max_seqlen)
    if element_size > 2:  # products in full precision are made number by number
        return Tile(32, 32, 8), False
    if keys > (256 if width <= 64 else 128):
        # With tcgen05 and two stages the larger tile spills.
        return Tile(64, 64, 4, num_stages=2) if family == 100 else Tile(128, 64, 8, num_stages=2), False
    if keys == 256 and width == 64 and family in (80, 942):
        return Tile(32, keys, 4), True
    spread = {80: width > 64, 90: width > 64 or (width == 64 and keys == 256), 100: True, 942: False}[family]
    return Tile(64, keys, 8 if spread and keys > 64 else 4), True


def backward_tile(head_dim: int, max_seqlen: int, architecture: int, element_size: int) -> Tile | None:
    """For backward_whole; None where its gradients are more than registers hold."""
    width, family, keys = padded_head_dim(head_dim), _family(architecture), _keys_held(max_seqlen)
    if element_size > 2 or width > 64 or keys > (256 if width <= 32 else 128):
        return None
    small = family == 942 or (family == 80 and (width == 64 or keys == 256))
    warps = 16 if family == 90 and keys == 256 else min(keys // 16, 8)
    registers = None
    if family == 90 and width <= 32 and keys > 64:
        registers = 128  # so that two programs of eight warps share a multiprocessor
    elif family == 100 and width == 64 and keys == 128:
        registers = 168  # left alone, the assembler stops at 128 and spills
    return Tile(32 if small else 64, keys, warps, registers=registers)


def backward_tiles(head_dim: int, architecture: int, element_size: int) -> tuple[Tile, Tile]:
    """For backward_queries and backward_keys."""
    width, family = padded_head_dim(head_dim), _family(architecture)
    if element_size > 2:
        return Tile(32, 32, 8), Tile(32, 32, 4 if width <= 32 else 8)
    if width <= 64:
        return Tile(64, 64, 4), Tile(32, 64, 4) if family in (80, 942) else Tile(64, 128, 8)
    queries = {80: Tile(64, 64, 8), 90: Tile(64, 64, 4), 100: Tile(64, 64, 8), 942: Tile(64, 32, 4)}[family]
    return queries, Tile(32, 64, 8) if family in (80, 942) else Tile(32, 128, 8)


def counts_in_int32(tokens: int, *rows: int) -> bool:
    """Whether every element of streams with such strides between rows has a number that fits.

    The kernels that hold a whole sequence count so. Should one be longer than its bound, they still stay
    within the stream; in a longer stream the others run, which count rows in int64.
    """
    return all(tokens * row < 2**31 for row in rows)


def in_eights(x: Tensor) -> Tensor:
    """The tensor itself where the kernels can read it in place, as they nearly always can, else a copy."""
    row, *inner, last = x.stride()
    fits = last == 1 and all(stride % 8 == 0 for stride in (row, *inner)) and row < _ROW_LIMIT
    # Within a row, parts and heads are counted in int32.
    fits = fits and all((n - 1) * stride < 2**31 for n, stride in zip(x.shape[1:-1], inner, strict=True))
    return x if fits or x.is_contiguous() else x.contiguous()


@triton.jit
def bounds_of(cu_seqlens, sequence, sequences, tokens):
    """Start and length of a sequence; of the rows past the end, for number S."""
    start = tl.load(cu_seqlens + sequence)
    end = tl.load(cu_seqlens + sequence + 1, mask=sequence < sequences, other=tokens)
    start = tl.minimum(tl.maximum(start, 0), tokens)
    return start, tl.minimum(tl.maximum(end, start), tokens) - start


@triton.jit
def load_rows(first, count, row, BLOCK: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """[BLOCK, BLOCK_D]: the `count` rows of one head from pointer `first` on, then zeros."""
    rows = tl.arange(0, BLOCK)[:, None]
    d = tl.arange(0, BLOCK_D)[None, :]
    return tl.load(first + (rows * row + d), mask=(rows < count) & (d < HEAD_DIM), other=0.0)


@triton.jit
def store_rows(first, values, count, row, BLOCK: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    rows = tl.arange(0, BLOCK)[:, None]
    d = tl.arange(0, BLOCK_D)[None, :]
    values = values.to(first.dtype.element_ty)
    tl.store(first + (rows * row + d), values, mask=(rows < count) & (d < HEAD_DIM))


@triton.jit
def fill_zeros(
    first, count, block, blocks, row, BLOCK: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr
):
    """Of the `count` rows of one head from `first` on: block number `block`, and every `blocks`-th after."""
    zeros = tl.zeros([BLOCK, BLOCK_D], tl.float32)
    for start in range(block * BLOCK, count, blocks * BLOCK):
        to = first + tl.cast(start, tl.int64) * row
        store_rows(to, zeros, count - start, row, BLOCK, HEAD_DIM, BLOCK_D)
