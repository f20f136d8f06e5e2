from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import fastjepa_kernels as fk

MEAN, STD = (0.485, 0.456, 0.406, 0.5), (0.229, 0.224, 0.225, 0.25)


def patches_one_by_one(images: Tensor, index: Tensor, patch_size: int, mean: Any, std: Any) -> Tensor:
    """Of float64 pixels already divided by 255."""
    batch, channels, _, width = images.shape
    out = torch.empty(*index.shape, channels * patch_size**2, dtype=torch.float64)
    for b in range(batch):
        for k, place in enumerate(index[b].tolist()):
            top, left = (side * patch_size for side in divmod(place, width // patch_size))
            pixels = [
                (float(images[b, c, top + i, left + j]) - mean[c]) / std[c]
                for c in range(channels)
                for i in range(patch_size)
                for j in range(patch_size)
            ]
            out[b, k] = torch.tensor(pixels, dtype=torch.float64)
    return out


@settings(deadline=None, max_examples=25)
@given(
    batch=st.integers(1, 3),
    channels=st.integers(1, 4),
    rows=st.integers(1, 3),
    columns=st.integers(1, 4),
    patch_size=st.integers(1, 5),
    kept=st.integers(1, 6),
    raw=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_it_is_pixel_by_pixel(
    batch: int, channels: int, rows: int, columns: int, patch_size: int, kept: int, raw: bool, seed: int
) -> None:
    random = torch.Generator().manual_seed(seed)
    shape = (batch, channels, rows * patch_size, columns * patch_size)
    images = torch.randint(256, shape, dtype=torch.uint8, generator=random)
    if not raw:
        images = images.double() / 255
    index = torch.randint(rows * columns, (batch, kept), generator=random)
    mean, std = MEAN[:channels], STD[:channels]
    pixels = images.double() / (255 if raw else 1)
    expected = patches_one_by_one(pixels, index, patch_size, mean, std)
    out = fk.patchify_gather(images, index, patch_size, mean, std, dtype=torch.float64)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-13)

    everything = torch.arange(rows * columns).expand(batch, -1)
    assert torch.equal(
        fk.patchify_gather(images, None, patch_size, mean, std),
        fk.patchify_gather(images, everything, patch_size, mean, std),
    )


def test_it_feeds_one_gemm_as_a_convolution() -> None:
    images = torch.randint(256, (3, 3, 12, 20), dtype=torch.uint8)
    mean, std = torch.tensor(MEAN[:3], dtype=torch.float64), torch.tensor(STD[:3], dtype=torch.float64)
    weight, bias = torch.randn(7, 3, 4, 4, dtype=torch.float64), torch.randn(7, dtype=torch.float64)
    normalised = (images.double() / 255 - mean[:, None, None]) / std[:, None, None]
    by_convolution = F.conv2d(normalised, weight, bias, stride=4).flatten(2).transpose(1, 2)  # [B, N, D]
    patches = fk.patchify_gather(images, None, 4, mean, std, dtype=torch.float64)
    torch.testing.assert_close(F.linear(patches, weight.flatten(1), bias), by_convolution)
    index = torch.tensor([[14, 0], [7, 7], [1, 2]])
    patches = fk.patchify_gather(images, index, 4, mean, std, dtype=torch.float64)
    kept = by_convolution.gather(1, index[:, :, None].expand(-1, -1, 7))
    torch.testing.assert_close(F.linear(patches, weight.flatten(1), bias), kept)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_bytes_are_normalised_as_well_as_the_result_can_hold(dtype: torch.dtype) -> None:
    images = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)  # every value there is
    exact = (images.double().flatten() / 255 - MEAN[0]) / STD[0]
    out = fk.patchify_gather(images, None, 16, MEAN[:1], STD[:1], dtype=dtype).flatten()
    assert out.dtype == dtype
    # Of the result's rounding, plus that of fp32 arithmetic on values of up to 2.6.
    allowed = exact.abs() * torch.finfo(dtype).eps / 2 + 4e-7
    assert bool(((out.double() - exact).abs() <= allowed).all())


def test_without_mean_and_std_pixels_stay_as_they_are() -> None:
    images = torch.randint(256, (2, 3, 4, 4), dtype=torch.uint8)
    floats = images / 255
    assert torch.equal(fk.patchify_gather(floats, None, 4).view(2, 3, 4, 4), floats)
    torch.testing.assert_close(fk.patchify_gather(images, None, 4).view(2, 3, 4, 4), floats)
    only_mean = fk.patchify_gather(floats, None, 4, mean=(0.5,) * 3).view(2, 3, 4, 4)
    torch.testing.assert_close(only_mean, floats - 0.5)
    only_std = fk.patchify_gather(floats, None, 4, std=torch.full((3,), 0.5)).view(2, 3, 4, 4)
    torch.testing.assert_close(only_std, floats * 2)


def test_strides_do_not_matter() -> None:
    images = torch.randint(256, (2, 3, 8, 12), dtype=torch.uint8)
    index = torch.tensor([[5, 0], [3, 3]])
    expected = fk.patchify_gather(images, index, 4, MEAN[:3], STD[:3])
    by_rows = images.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)  # as decoders give them
    cut_out = F.pad(images, (3, 5, 2, 1))[:, :, 2:-1, 3:-5]
    for strided in (images.contiguous(memory_format=torch.channels_last), by_rows, cut_out):
        assert not strided.is_contiguous()
        assert torch.equal(fk.patchify_gather(strided, index, 4, MEAN[:3], STD[:3]), expected)
    repeated = images[:1].expand(2, -1, -1, -1)
    out = fk.patchify_gather(repeated, index, 4)
    assert torch.equal(out[1], fk.patchify_gather(images[:1], index[1:], 4)[0])


def test_packed_images_of_unequal_length_and_of_none() -> None:
    images = torch.randint(256, (3, 1, 4, 6), dtype=torch.uint8)
    lists = [[5, 0, 2], [], [1]]
    starts = torch.tensor([0, 3, 3, 4], dtype=torch.int32)
    index = torch.tensor([*lists[0], *lists[2], 0])  # and one row past the end
    out = fk.patchify_gather(images, index, 2, MEAN[:1], STD[:1], cu_seqlens=starts)
    assert out.shape == (5, 4)
    for image, (start, end) in enumerate(pairwise(starts.tolist())):
        kept = torch.tensor([lists[image]], dtype=torch.long)
        alone = fk.patchify_gather(images[image : image + 1], kept, 2, MEAN[:1], STD[:1])
        assert torch.equal(out[start:end], alone[0])
    assert bool((out[4] == 0).all())


def test_there_is_no_gradient() -> None:
    images = torch.rand(1, 1, 4, 4, requires_grad=True)
    assert not fk.patchify_gather(images, None, 2).requires_grad


IMAGES, INDEX = torch.zeros(2, 3, 4, 6), torch.zeros(2, 2, dtype=torch.long)
STARTS = torch.tensor([0, 2, 4], dtype=torch.int32)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"images": IMAGES[0]}, r"images must be \[B, C, H, W\]"),
        ({"images": IMAGES.long()}, "images must be uint8 or floating point"),
        ({"patch_size": 4}, "patch_size must divide the image, got 4 for 4 x 6 pixels"),
        ({"patch_size": 0}, "patch_size must divide"),
        ({"dtype": torch.uint8}, "dtype must be floating point"),
        ({"mean": (0.5,)}, "mean must have one value for each of 3 channels"),
        ({"std": torch.ones(4)}, "std must have one value for each of 3 channels"),
        ({"index": INDEX + 6}, r"index must lie in 0\.\.5, got 6\.\.6"),
        ({"index": INDEX - 1}, r"index must lie in 0\.\.5"),
        ({"index": INDEX.float()}, "index must hold integers"),
        ({"index": INDEX[:1]}, r"index must be \[B, K\] with B = 2"),
        ({"index": None, "cu_seqlens": STARTS}, "cu_seqlens needs a packed index"),
        ({"cu_seqlens": STARTS}, r"with cu_seqlens, index must be \[T\]"),
        ({"index": INDEX.flatten(), "cu_seqlens": STARTS[:2]}, r"B \+ 1 = 3 entries, got 2"),
        ({"index": INDEX.flatten()[:3], "cu_seqlens": STARTS}, "ends at 4, but there are only 3"),
        ({"index": INDEX.to("meta")}, "one device, got images on cpu, index on meta"),
    ],
)
def test_wrong_arguments_are_named(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fk.patchify_gather(**{"images": IMAGES, "index": INDEX, "patch_size": 2, **arguments})
