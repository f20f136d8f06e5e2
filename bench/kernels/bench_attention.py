"""packed_attention: over the predictor's short sequences, and the encoder's."""

from itertools import accumulate

import torch
from torch import Tensor

import fastjepa_kernels as fk
from bench.kernels import peers, published, stock
from bench.kernels.case import Case, Compare, Phase, Random, Scale, Way, ours


def case(name: str, lengths: tuple[int, ...], heads: int, head_dim: int, dtype: torch.dtype) -> Case:
    tokens, longest = sum(lengths), max(lengths)
    starts, equal = [0, *accumulate(lengths)], len(set(lengths)) == 1

    def attend(qkv: Tensor, cu_seqlens: Tensor) -> Tensor:
        return fk.packed_attention(qkv, cu_seqlens, longest, equal=equal)

    def make(random: Random) -> tuple[Tensor, Tensor]:
        qkv = random.normal(tokens, 3, heads, head_dim, dtype=dtype)
        return qkv, torch.tensor(starts, dtype=torch.int32, device=random.device)

    def ways(device_type: str) -> list[Way]:
        listed = [
            *ours("packed_attention", attend, device_type),
            Way("SDPA", "stock", lambda qkv, _: stock.attention(qkv, lengths)),
        ]
        if equal:  # the published code has no others
            listed.append(Way("published", "published", lambda qkv, _: published.attention(qkv, lengths)))
        return listed + peers.attention(device_type, lengths)

    # qkv in and o out; q, k, v and the gradient of o in, that of qkv out.
    values = tokens * heads * head_dim
    forward, backward = 4 * values * dtype.itemsize, 7 * values * dtype.itemsize
    return Case(
        op="packed_attention",
        name=name,
        dtype=dtype,
        make=make,
        ways=ways,
        exact=lambda qkv, _: published.attention(qkv, lengths),
        bytes_moved={"forward": forward, "backward": backward, "forward+backward": forward + backward},
        with_gradient=(0,),
    )


def predictor(images: int, length: int, heads: int, head_dim: int, dtype: torch.dtype) -> Case:
    name = f"L {length}, head dim {head_dim}, {4 * images} sequences, {heads} heads"
    return case(name, (length,) * (4 * images), heads, head_dim, dtype)


def ragged(images: int, heads: int, head_dim: int, dtype: torch.dtype) -> Case:
    """Context tokens as `packed` has them, 81.7 ± 13.5, and a block of 33; the same lengths every time."""
    random = torch.Generator().manual_seed(0)
    context = (81.7 + 13.5 * torch.randn(images, generator=random)).round().int().clamp(11, 140)
    lengths = tuple(int(kept) + 33 for kept in context for _ in range(4))
    name = f"L {min(lengths)} to {max(lengths)}, head dim {head_dim}, {len(lengths)} sequences, {heads} heads"
    return case(name, lengths, heads, head_dim, dtype)


def cases(scale: Scale, dtype: torch.dtype) -> list[Case]:
    if scale == "small":
        return [
            case("L 1 to 33, head dim 24", (33, 1, 17, 32), 2, 24, dtype),
            case("L 35, head dim 32", (35,) * 3, 3, 32, dtype),
            case("L 19, head dim 88", (19,) * 2, 1, 88, dtype),
        ]
    if scale == "cpu":
        return [predictor(4, length, 12, 32, dtype) for length in (84, 225)] + [
            case("L 50, head dim 64, 16 sequences, 6 heads", (50,) * 16, 6, 64, dtype)
        ]
    short = [
        predictor(128, length, heads, head_dim, dtype)
        for head_dim, heads in ((24, 16), (32, 12))
        for length in (64, 84, 113, 154, 225)
    ]
    encoder = [
        case(
            f"L {length}, head dim {head_dim}, 128 sequences, 16 heads", (length,) * 128, 16, head_dim, dtype
        )
        for length, head_dim in ((50, 64), (196, 64), (68, 80), (256, 80), (256, 88))
    ]
    return [*short, ragged(128, 16, 24, dtype), ragged(128, 12, 32, dtype), *encoder]


def test_packed_attention(case: Case, phase: Phase, compare: Compare) -> None:
    compare(case, phase)
