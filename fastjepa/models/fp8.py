"""The target encoder's forward pass, which has no gradient, with its GEMMs in float8_e4m3fn.

Input and weight of a GEMM have a scale per row each (`fastjepa_kernels.fp8_linear`); the residual stream, the
attention and the patch embedding stay bf16. Where the stream becomes the input of a GEMM, one kernel adds the
residual, normalises and quantises; another does GELU and quantises.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import cast

import torch
from torch import Tensor, nn

import fastjepa_kernels as fk
from fastjepa.models.block import Block
from fastjepa.models.sequences import Sequences
from fastjepa.models.vit import VisionTransformer

_MULTIPLE = 16  # that both sides of a weight must be of, for its GEMM to be in fp8


@dataclass(frozen=True)
class _Linear:
    """A layer beside the e4m3 copy of its weight, which is a view of a buffer of many."""

    layer: nn.Linear
    q: Tensor  # [N, K] float8_e4m3fn
    scale: Tensor  # [N] fp32

    def __call__(self, q: Tensor, scale: Tensor) -> Tensor:
        """q [T, K] and scale [T] to bf16 [T, N]."""
        return fk.fp8_linear(q, scale, self.q, self.scale, self.layer.bias)


@dataclass(frozen=True)
class _Quantised:
    """The weights of one K, in the order of the blocks: those of a block lie side by side in a flat
    parameter group too, and are then quantised in one launch."""

    layers: list[nn.Linear]
    q: Tensor  # [R, K] float8_e4m3fn
    scale: Tensor  # [R] fp32

    @classmethod
    def of(cls, layers: list[nn.Linear]) -> "_Quantised":
        rows, columns = sum(layer.out_features for layer in layers), layers[0].in_features
        weight = layers[0].weight
        return cls(
            layers,
            weight.new_empty((rows, columns), dtype=torch.float8_e4m3fn),
            weight.new_empty(rows, dtype=torch.float32),
        )

    def linears(self) -> Iterator[_Linear]:
        sizes = [layer.out_features for layer in self.layers]
        yield from map(_Linear, self.layers, self.q.split(sizes), self.scale.split(sizes))

    def refresh(self) -> None:
        start = 0
        for weight in _joined([layer.weight for layer in self.layers]):  # [rows, K]
            end = start + len(weight)
            fk.quantize_rows_(weight, self.q[start:end], self.scale[start:end])
            start = end


def _joined(weights: list[Tensor]) -> Iterator[Tensor]:
    """Matrices of as many columns, each run of them that lies end to end in memory as one: [rows, K]."""
    starts = [0, *(i for i, pair in enumerate(pairwise(weights), 1) if not _is_next(*pair)), len(weights)]
    for start, end in pairwise(starts):
        first = weights[start].detach()
        rows = sum(len(weight) for weight in weights[start:end])
        yield first.as_strided((rows, first.shape[1]), first.stride()) if end - start > 1 else first


def _is_next(first: Tensor, second: Tensor) -> bool:
    return (
        first.is_contiguous()
        and second.is_contiguous()
        and first.untyped_storage().data_ptr() == second.untyped_storage().data_ptr()
        and int(second.storage_offset()) == first.storage_offset() + first.numel()
    )


@dataclass(frozen=True)
class _Fp8Block:
    block: Block
    qkv: _Linear
    proj: _Linear
    mlp: tuple[_Linear, _Linear] | None  # None: its hidden width is no multiple of 16, and it stays bf16

    def __call__(
        self, x: Tensor, branch: Tensor | None, sequences: Sequences, rows: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """The stream and what is to be added to it, [T, D] each, or [R, D] at `rows`; the next norm adds."""
        block, heads = self.block, self.block.attn.heads
        norm = block.norm1
        if branch is None:
            q, scale = fk.layer_norm_quantize(x, norm.weight, norm.bias, norm.eps)
        else:
            q, scale, x = fk.layer_norm_quantize(x, norm.weight, norm.bias, norm.eps, branch)
        tokens, width = x.shape
        qkv = self.qkv(q, scale).view(tokens, 3, heads, width // heads)  # [T, 3, H, d]
        cut, longest, equal = sequences.cu_seqlens, sequences.max_seqlen, sequences.equal
        out = fk.packed_attention(qkv, cut, longest, equal=equal)  # [T, H, d]
        out = out.reshape(tokens, width)
        if rows is not None:
            x, out = x.index_select(0, rows), out.index_select(0, rows)  # [R, D]
        branch = self.proj(*_quantised(out))
        norm = block.norm2
        if self.mlp is None:
            x = x + branch
            return x, block.mlp(norm(x))
        fc1, fc2 = self.mlp
        q, scale, x = fk.layer_norm_quantize(x, norm.weight, norm.bias, norm.eps, branch)
        return x, fc2(*fk.gelu_quantize(fc1(q, scale)))


def _quantised(x: Tensor) -> tuple[Tensor, Tensor]:
    q, scale = torch.empty_like(x, dtype=torch.float8_e4m3fn), x.new_empty(len(x), dtype=torch.float32)
    fk.quantize_rows_(x, q, scale)
    return q, scale


class Fp8Encoder:
    """`encoder(images, final_norm=False)` without gradient, in fp8. No module: it has no weights of its own.

    Norms, biases, positions and the patch embedding are read from the encoder in each pass, the weights of
    the blocks only in `refresh`. Their e4m3 copies take half the memory of the bf16 ones.

    Args:
        encoder: in bf16; it may change in place.
        emulate: compute the same numbers on a device that has no fp8. That is exact, and slow.

    Raises:
        ValueError: the device has no fp8, the encoder is not in bf16, or its width is not a multiple of 16.
    """

    def __init__(self, encoder: VisionTransformer, emulate: bool = False) -> None:
        weight, width = encoder.norm.weight, encoder.shape.width
        if not emulate and not fk.fp8_available(weight.device):
            name = torch.cuda.get_device_name(weight.device) if weight.is_cuda else str(weight.device)
            raise ValueError(
                f"this device has no fp8 matrix products: {name}. NVIDIA's GPUs have them from Ada and "
                "Hopper (sm_89, sm_90) on; compute the target encoder in bf16 here"
            )
        if weight.dtype != torch.bfloat16:
            raise ValueError(f"an encoder in fp8 is made from one in bfloat16, got {weight.dtype}")
        if width % _MULTIPLE:
            raise ValueError(f"fp8 needs a width that is a multiple of {_MULTIPLE}, got {width}")
        self.encoder = encoder
        blocks = cast(list[Block], list(encoder.blocks))
        by_columns: dict[int, list[nn.Linear]] = {}
        for block in blocks:
            mlp_fits = block.mlp.fc1.out_features % _MULTIPLE == 0
            layers = [block.attn.qkv, block.attn.proj, *([block.mlp.fc1, block.mlp.fc2] if mlp_fits else [])]
            for layer in layers:
                by_columns.setdefault(layer.in_features, []).append(layer)
        self._weights = [_Quantised.of(layers) for layers in by_columns.values()]
        linears = {each.layer: each for weights in self._weights for each in weights.linears()}
        self._blocks = [
            _Fp8Block(
                block,
                linears[block.attn.qkv],
                linears[block.attn.proj],
                (linears[block.mlp.fc1], linears[block.mlp.fc2]) if block.mlp.fc1 in linears else None,
            )
            for block in blocks
        ]
        self.refresh()

    @torch.no_grad()
    def refresh(self) -> None:
        """Quantise the weights that the encoder has now: after each update of it.

        A launch for each weight, or for each run of weights that lie end to end. Nothing is allocated on a
        GPU, and nothing waits for it.
        """
        for weights in self._weights:
            weights.refresh()

    @torch.no_grad()
    def hidden(self, images: Tensor, rows: Tensor | None = None) -> Tensor:
        """What the last block gives, before the final norm.

        Nothing waits for the device, so a CUDA graph can hold it.

        Args:
            images: [B, C, H, W] uint8, or floating point and already normalised.
            rows: int64 [R]: of the B * N tokens, image by image, those wanted. The last block computes its
                projection and its MLP for these alone. None for all.

        Returns:
            bf16 [B, N, D], or [R, D] with `rows`. A class token comes first and counts as one of the N.
        """
        x, sequences = self.encoder.embed(images)  # [T, D]
        branch: Tensor | None = None
        last = len(self._blocks) - 1
        for depth, block in enumerate(self._blocks):
            x, branch = block(x, branch, sequences, rows if depth == last else None)
        x = x if branch is None else x + branch
        return x if rows is not None else x.view(sequences.count, sequences.max_seqlen, x.shape[1])
