"""What is shipped: each op's Triton way, forward and backward, at the sizes of real training."""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fastjepa_kernels import choice
from fastjepa_kernels.rounding import StochasticRounding

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
BATCH = 128


@dataclass(frozen=True)
class Case:
    """A call of one op's Triton way.

    Attributes:
        op: as `fastjepa_kernels.choice` calls it.
        name: the model and what else tells it apart.
        arguments: of the op; tensors on the device "meta".
        aligned: rows begin at multiples of 16 bytes, so that vectors can be loaded and stored.
        stores: whether it writes more than a number for each program.
        most_registers: of any of its kernels, by target.
    """

    op: str
    name: str
    arguments: tuple[Any, ...]
    aligned: bool = True
    stores: bool = True
    most_registers: Mapping[str, int] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"{self.op} {self.name}"

    @property
    def host(self) -> Callable[..., Any]:
        """The host function that launches."""
        way = next(way for way in choice._OPS[self.op].ways if way.name == "triton")
        if not way.takes(*self.arguments):
            raise ValueError(f"{self}: not for Triton")
        return way.run


def meta(*shape: int, dtype: torch.dtype = BF16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def cases() -> list[Case]:
    """All of them. `make test` compiles the first of each kernel, so the most usual come first."""
    ops = (_gather, _patchify, _attention, _block, _loss, _ema, _adamw, _quantize, _fused_quantize)
    return [case for op in ops for case in op()]


def _gather() -> Iterator[Case]:
    def forward(
        width: int, dtype: torch.dtype, *, patches: int = 196, kept: int = 84, out: torch.dtype | None = None,
        pos: bool = False, index: torch.dtype = torch.int64, packed: bool = False,
    ) -> tuple[Any, ...]:  # fmt: skip
        return (
            meta(BATCH, patches, width, dtype=dtype),
            meta(BATCH * kept, dtype=index) if packed else meta(BATCH, kept, dtype=index),
            meta(patches, width, dtype=FP32) if pos else None,
            meta(BATCH + 1, dtype=torch.int32) if packed else None,
            out or dtype,
        )

    yield Case("gather_tokens", "L/16 bf16", forward(1024, BF16))
    yield Case("gather_tokens", "B/16 bf16 with positions", forward(768, BF16, pos=True))
    yield Case("gather_tokens", "H/14 bf16 packed", forward(1280, BF16, patches=256, packed=True))
    yield Case("gather_tokens", "g/16 fp16 packed int32", forward(1408, FP16, packed=True, index=torch.int32))
    yield Case(
        "gather_tokens",
        "L/16 fp32 to bf16, positions, packed",
        forward(1024, FP32, out=BF16, pos=True, packed=True),
    )
    yield Case("gather_tokens", "width 90 bf16", forward(90, BF16), aligned=False)

    def backward(
        width: int, dtype: torch.dtype, *, patches: int = 196, kept: int = 84, images_per_sum: int = 1,
        out: torch.dtype | None = None, index: torch.dtype = torch.int64, packed: bool = False,
    ) -> tuple[Any, ...]:  # fmt: skip
        return (
            meta(BATCH * kept, width, dtype=dtype) if packed else meta(BATCH, kept, width, dtype=dtype),
            meta(BATCH * kept, dtype=index) if packed else meta(BATCH, kept, dtype=index),
            meta(BATCH + 1, dtype=torch.int32) if packed else None,
            BATCH,
            patches,
            images_per_sum,
            out or dtype,
        )

    op = "gather_tokens_backward"
    yield Case(op, "L/16 bf16", backward(1024, BF16))
    yield Case(op, "H/14 bf16 packed", backward(1280, BF16, patches=256, packed=True))
    yield Case(op, "g/16 fp16 packed int32", backward(1408, FP16, packed=True, index=torch.int32))
    yield Case(op, "L/16 fp32", backward(1024, FP32))
    yield Case(op, "B/16 bf16 to positions", backward(768, BF16, images_per_sum=8, out=FP32))
    yield Case(op, "width 90 bf16", backward(90, BF16), aligned=False)


def _patchify() -> Iterator[Case]:
    def arguments(
        patch: int, dtype: torch.dtype, *, images: Tensor | None = None, kept: int | None = 84,
        index: torch.dtype = torch.int64, packed: bool = False, normalise: bool = True,
    ) -> tuple[Any, ...]:  # fmt: skip
        channels = meta(3, dtype=torch.float64) if normalise else None
        taken = None
        if kept is not None:
            taken = meta(BATCH * kept, dtype=index) if packed else meta(BATCH, kept, dtype=index)
        return (
            meta(BATCH, 3, 224, 224, dtype=torch.uint8) if images is None else images,
            taken,
            patch,
            channels,
            channels,
            dtype,
            meta(BATCH + 1, dtype=torch.int32) if packed else None,
        )

    op = "patchify_gather"
    last = meta(BATCH, 224, 224, 3, dtype=torch.uint8).permute(0, 3, 1, 2)
    yield Case(op, "p16 bytes to bf16", arguments(16, BF16))
    yield Case(op, "p16 bytes to bf16, all patches", arguments(16, BF16, kept=None))
    yield Case(op, "p16 bytes to fp16, packed int32", arguments(16, FP16, packed=True, index=torch.int32))
    yield Case(op, "p16 fp32 to bf16", arguments(16, BF16, images=meta(BATCH, 3, 224, 224, dtype=FP32)))
    # A pixel's neighbour is three bytes away, and rows of 14 are no multiple of a vector.
    yield Case(op, "p16 channels-last bytes to bf16", arguments(16, BF16, images=last), aligned=False)
    yield Case(op, "p14 bytes to bf16", arguments(14, BF16), aligned=False)
    yield Case(op, "p14 bytes to bf16, packed", arguments(14, BF16, packed=True), aligned=False)


# Predictors have heads of 24 (L, H and g) and 32 (B), encoders of 64 (S, B, L), 80 (H) and 88 (g).
HEADS = {24: 16, 32: 12, 64: 16, 80: 16, 88: 16}
LENGTHS = (64, 84, 113, 154, 225, 256, 784)


def _attention() -> Iterator[Case]:
    def arguments(head_dim: int, length: int, dtype: torch.dtype) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
        tokens, heads = BATCH * length, HEADS[head_dim]
        qkv = meta(tokens, 3, heads, head_dim, dtype=dtype)
        out = meta(tokens, heads, head_dim, dtype=dtype)
        lse = meta(heads, tokens, dtype=FP32)
        rest = (meta(BATCH + 1, dtype=torch.int32), length, head_dim**-0.5)
        return (qkv, *rest), (out, qkv, out, lse, *rest)

    def both(head_dim: int, length: int, dtype: torch.dtype) -> Iterator[Case]:
        forward, backward = arguments(head_dim, length, dtype)
        name = f"head {head_dim}, {length} tokens, {str(dtype).removeprefix('torch.')}"
        # Two programs of eight warps then share a multiprocessor.
        most = {"sm_90": 128} if head_dim <= 32 and 64 < length <= 128 else {}
        yield Case("packed_attention", name, forward)
        # Exact products of wide heads in fp32 are not Triton's.
        if dtype != FP32 or head_dim <= 64:
            yield Case("packed_attention_backward", name, backward, most_registers=most)

    for head_dim in HEADS:
        for length in LENGTHS:
            yield from both(head_dim, length, BF16)
    yield from both(64, 4096, BF16)
    for head_dim, length in ((24, 84), (64, 784)):
        yield from both(head_dim, length, FP16)
    yield from both(64, 113, FP32)


def _loss() -> Iterator[Case]:
    def forward(
        width: int, dtype: torch.dtype, *, patches: int = 196, hidden: torch.dtype | None = None,
        index: torch.dtype = torch.int64, weights: bool = True, gradient: bool = True,
    ) -> tuple[Any, ...]:  # fmt: skip
        masks, targets = 4, 38
        weight = meta(width, dtype=FP32) if weights else None
        return (
            meta(masks, BATCH, targets, width, dtype=dtype),
            meta(BATCH, patches, width, dtype=hidden or dtype),
            meta(masks, BATCH, targets, dtype=index),
            weight, weight, 1e-6, 1e-5, 1.0, gradient,
        )  # fmt: skip

    yield Case("jepa_loss", "L/16 bf16", forward(1024, BF16))
    yield Case("jepa_loss", "S/16 bf16", forward(384, BF16))
    yield Case("jepa_loss", "B/16 bf16", forward(768, BF16))
    yield Case("jepa_loss", "H/14 bf16", forward(1280, BF16, patches=256))
    yield Case("jepa_loss", "g/16 fp16 int32", forward(1408, FP16, index=torch.int32))
    yield Case("jepa_loss", "L/16 fp32", forward(1024, FP32))
    yield Case("jepa_loss", "L/16 bf16 without weights", forward(1024, BF16, weights=False))
    yield Case("jepa_loss", "L/16 bf16, no gradient", forward(1024, BF16, gradient=False), stores=False)
    yield Case("jepa_loss", "width 90 bf16", forward(90, BF16), aligned=False)
    for dtype, name in ((BF16, "bf16"), (FP32, "fp32")):
        slope = meta(4, BATCH, 38, 1024, dtype=dtype)
        yield Case("jepa_loss_backward", f"L/16 {name}", (slope, meta(dtype=FP32)))
    yield Case("jepa_loss_backward", "width 90 bf16", (meta(1, 3, 5, 90), meta(dtype=FP32)), aligned=False)


def _ema() -> Iterator[Case]:
    def arguments(
        shadow: torch.dtype, source: torch.dtype, *, working: torch.dtype | None = None,
        momentum: float | Tensor = 0.996, rounding: StochasticRounding | None = None, first: int = 0,
    ) -> tuple[Any, ...]:  # fmt: skip
        shapes = [(3072, 1024), (3072,), (1024, 3, 16, 16), (1,)]

        def tensors(dtype: torch.dtype) -> list[Tensor]:
            # A tensor that does not begin its memory is not aligned.
            return [meta(math.prod(shape) + first, dtype=dtype)[first:].view(shape) for shape in shapes]

        return tensors(shadow), tensors(source), tensors(working) if working else [], momentum, rounding

    def rounding(step: int | Tensor) -> StochasticRounding:
        return StochasticRounding(seed=1, step=step, parameters=[0, 1, 2, 3], offsets=[0, 0, 0, 0])

    device = meta(dtype=FP32)
    op = "ema_update_"
    yield Case(op, "fp32", arguments(FP32, FP32))
    yield Case(
        op, "fp32, bf16 copy, momentum on the device", arguments(FP32, FP32, working=BF16, momentum=device)
    )
    yield Case(op, "fp32 from bf16", arguments(FP32, BF16, momentum=device))
    yield Case(op, "fp32 from fp16, fp16 copy", arguments(FP32, FP16, working=FP16))
    yield Case(op, "bf16", arguments(BF16, BF16))
    yield Case(
        op,
        "bf16 from fp32, stochastic",
        arguments(BF16, FP32, rounding=rounding(meta(dtype=torch.int64)), momentum=device),
    )
    yield Case(op, "bf16, bf16 copy, stochastic", arguments(BF16, BF16, working=BF16, rounding=rounding(7)))
    yield Case(op, "fp32 not aligned", arguments(FP32, FP32, first=1), aligned=False)
    yield Case(
        op,
        "fp32, bf16 copy, not aligned",
        arguments(FP32, FP32, working=BF16, momentum=device, first=1),
        aligned=False,
    )


def _block() -> Iterator[Case]:
    """Of the context encoder's tokens in `truncate`, and of the predictor's."""
    sizes = (("B/16", 6400, 768), ("predictor", 43_000, 384), ("H/14", 8704, 1280))
    for name, tokens, width in sizes:
        x, weight, statistic = meta(tokens, width), meta(width), meta(tokens, dtype=FP32)
        yield Case("add_layer_norm", name, (x, x, weight, weight, 1e-6))
        # With it goes the kernel that adds up the parts, which stores a number a thread.
        backward = (x, x, x, weight, weight, statistic, statistic, True)
        yield Case("add_layer_norm_backward", name, backward, stores=False)
    x, weight, statistic = meta(6400, 768), meta(768), meta(6400, dtype=FP32)
    yield Case("add_layer_norm", "B/16, nothing added", (x, None, weight, weight, 1e-6))
    last = (x, None, x, weight, weight, statistic, statistic, False)
    yield Case("add_layer_norm_backward", "B/16, last norm", last, stores=False)
    yield Case("gelu_backward_", "B/16", (meta(6400, 3072), meta(6400, 3072), True), stores=False)
    yield Case("column_sums", "B/16 qkv", (meta(6400, 2304),), stores=False)


def _adamw() -> Iterator[Case]:
    def arguments(
        grad: torch.dtype, *, weight: torch.dtype | None = BF16, average: bool = True, decayed: bool = True,
        n: int = 302_309_376, first: int = 0,
    ) -> tuple[Any, ...]:  # fmt: skip
        def flat(dtype: torch.dtype | None) -> Tensor | None:
            return None if dtype is None else meta(n + first, dtype=dtype)[first:]

        return (
            flat(FP32), flat(grad), flat(FP32), flat(FP32), meta(6, dtype=torch.float64),
            flat(weight), flat(FP32) if average else None, flat(weight) if average else None,
            0.9, 0.999, 1e-8, decayed,
        )  # fmt: skip

    op = "adamw_ema_"
    yield Case(op, "L/16 bf16", arguments(BF16))
    yield Case(op, "L/16 bf16, not decayed", arguments(BF16, decayed=False))
    yield Case(op, "L/16 bf16 without an average", arguments(BF16, average=False))
    yield Case(op, "L/16 bf16, gradients summed in fp32", arguments(FP32))
    yield Case(op, "L/16 fp32", arguments(FP32, weight=None))
    yield Case(op, "L/16 bf16 of odd length", arguments(BF16, n=302_309_377))
    yield Case(op, "bf16 not aligned", arguments(BF16, first=1), aligned=False)


def _quantize() -> Iterator[Case]:
    def arguments(rows: int, columns: int, dtype: torch.dtype) -> tuple[Any, ...]:
        return (
            meta(rows, columns, dtype=dtype),
            meta(rows, columns, dtype=torch.float8_e4m3fn),
            meta(rows, dtype=FP32),
        )

    op = "quantize_rows_"
    yield Case(op, "L/16 bf16 [3072, 1024]", arguments(3072, 1024, BF16))
    yield Case(op, "H/14 bf16 [3840, 1280]", arguments(3840, 1280, BF16))
    yield Case(op, "H/14 fp32 [1280, 5120]", arguments(1280, 5120, FP32))
    yield Case(op, "g/16 fp16 [1408, 6144]", arguments(1408, 6144, FP16))
    yield Case(op, "fp32 [64, 16384]", arguments(64, 16384, FP32))
    yield Case(op, "bf16 [30, 90]", arguments(30, 90, BF16), aligned=False)


def _fused_quantize() -> Iterator[Case]:
    def layer_norm(width: int, *, residual: bool = True, patches: int = 196) -> tuple[Any, ...]:
        x, weight = meta(BATCH * patches, width), meta(width)
        return x, weight, weight, 1e-6, meta(BATCH * patches, width) if residual else None

    op = "layer_norm_quantize"
    yield Case(op, "L/16 bf16 with a residual", layer_norm(1024))
    yield Case(op, "L/16 bf16", layer_norm(1024, residual=False))
    yield Case(op, "B/16 bf16 with a residual", layer_norm(768))
    yield Case(op, "H/14 bf16 with a residual", layer_norm(1280, patches=256))
    yield Case(op, "g/16 bf16 with a residual", layer_norm(1408))
    op = "gelu_quantize"
    yield Case(op, "L/16 bf16", (meta(BATCH * 196, 4096),))
    yield Case(op, "B/16 bf16", (meta(BATCH * 196, 3072),))
    yield Case(op, "H/14 bf16", (meta(BATCH * 256, 5120),))
    yield Case(op, "g/16 bf16", (meta(BATCH * 196, 6144),))
