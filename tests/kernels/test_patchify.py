from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import fastjepa_kernels as fk

IMPLEMENTATIONS = fk.implementations("patchify_gather", "cpu")
each_implementation = pytest.mark.parametrize("implementation", IMPLEMENTATIONS)


@pytest.fixture
def use(implementation: str) -> Iterator[str]:
    with fk.use(implementation, strict=True):
        yield implementation


@pytest.fixture
def poisoned() -> Iterator[None]:
    """Memory that nothing was written to reads as NaN."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


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


@each_implementation
@settings(deadline=None, max_examples=25)
@given(
    batch=st.integers(1, 3),
    channels=st.integers(1, 4),
    rows=st.integers(1, 3),
    columns=st.integers(1, 4),
    patch_size=st.integers(1, 5),
    kept=st.integers(1, 6),  # more than there are patches, so that some repeat
    raw=st.booleans(),
    channels_last=st.booleans(),
    index_dtype=st.sampled_from([torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8]),
    seed=st.integers(0, 2**31),
)
def test_it_is_pixel_by_pixel(
    implementation: str,
    batch: int,
    channels: int,
    rows: int,
    columns: int,
    patch_size: int,
    kept: int,
    raw: bool,
    channels_last: bool,
    index_dtype: torch.dtype,
    seed: int,
) -> None:
    random = torch.Generator().manual_seed(seed)
    shape = (batch, channels, rows * patch_size, columns * patch_size)
    images = torch.randint(256, shape, dtype=torch.uint8, generator=random)
    work = torch.float32 if implementation == "triton" else torch.float64
    if not raw:
        images = images.to(work) / 255
    index = torch.randint(rows * columns, (batch, kept), generator=random)
    mean, std = MEAN[:channels], STD[:channels]
    pixels = images.double() / (255 if raw else 1)
    expected = patches_one_by_one(pixels, index, patch_size, mean, std)
    if channels_last:
        images = images.contiguous(memory_format=torch.channels_last)
    everything = torch.arange(rows * columns).expand(batch, -1)
    starts = torch.arange(batch + 1, dtype=torch.int32) * kept
    with fk.use(implementation, strict=True):
        out = fk.patchify_gather(images, index.to(index_dtype), patch_size, mean, std, dtype=work)
        packed = index.flatten().to(index_dtype)
        assert torch.equal(
            fk.patchify_gather(images, packed, patch_size, mean, std, work, starts), out.flatten(0, 1)
        )
        assert torch.equal(
            fk.patchify_gather(images, None, patch_size, mean, std),
            fk.patchify_gather(images, everything, patch_size, mean, std),
        )
    atol = 1e-13 if work == torch.float64 else 1e-6  # twice fp32's eps, of values of up to 2.6
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=atol)


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


@pytest.mark.parametrize("implementation", [name for name in IMPLEMENTATIONS if name != "triton"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.usefixtures("use")
def test_bytes_are_normalised_as_well_as_the_result_can_hold(dtype: torch.dtype) -> None:
    images = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)  # every value there is
    exact = (images.double().flatten() / 255 - MEAN[0]) / STD[0]
    out = fk.patchify_gather(images, None, 16, MEAN[:1], STD[:1], dtype=dtype).flatten()
    assert out.dtype == dtype
    # Of the result's rounding, plus that of fp32 arithmetic on values of up to 2.6.
    allowed = exact.abs() * torch.finfo(dtype).eps / 2 + 4e-7
    assert bool(((out.double() - exact).abs() <= allowed).all())


@each_implementation
@pytest.mark.parametrize("patch_size", [3, 14, 16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.usefixtures("use", "poisoned")
def test_every_element_is_written(patch_size: int, dtype: torch.dtype) -> None:
    random = torch.Generator().manual_seed(0)
    shape = (2, 3, 2 * patch_size, 3 * patch_size)
    images = torch.randint(256, shape, dtype=torch.uint8, generator=random)
    index = torch.tensor([[5, 0, 3], [4, 4, 1]])
    exact = patches_one_by_one(images.double() / 255, index, patch_size, MEAN, STD)
    starts = torch.tensor([0, 3, 6], dtype=torch.int32)
    packed = torch.cat([index.flatten(), torch.tensor([0, 2])])
    for found in (
        fk.patchify_gather(images, index, patch_size, MEAN[:3], STD[:3], dtype=dtype),
        fk.patchify_gather(images, packed, patch_size, MEAN[:3], STD[:3], dtype, starts)[:6].view_as(exact),
        fk.patchify_gather(images / 255, index, patch_size, MEAN[:3], STD[:3], dtype=dtype),
    ):
        assert found.dtype == dtype
        torch.testing.assert_close(found.double(), exact, rtol=torch.finfo(dtype).eps / 2, atol=1e-6)
    past = fk.patchify_gather(images, packed, patch_size, MEAN[:3], STD[:3], dtype, starts)[6:]
    assert bool((past == 0).all())


@each_implementation
@pytest.mark.usefixtures("use")
def test_a_patch_may_be_the_whole_image() -> None:
    images = torch.randint(256, (3, 2, 60, 60), dtype=torch.uint8)
    out = fk.patchify_gather(images, torch.tensor([[0], [0], [0]]), 60, MEAN[:2], STD[:2])
    mean, std = torch.tensor(MEAN[:2]), torch.tensor(STD[:2])
    expected = (images / 255 - mean[:, None, None]) / std[:, None, None]
    torch.testing.assert_close(out.view_as(expected), expected)


@each_implementation
@pytest.mark.usefixtures("use")
def test_numbers_and_tensors_of_any_precision_mean_the_same() -> None:
    images = torch.randint(256, (2, 2, 4, 4), dtype=torch.uint8)
    mean, std = (0.5, 0.25), (0.5, 2.0)  # without rounding in any of them
    expected = fk.patchify_gather(images, None, 2, mean, std)
    for dtype in (torch.float64, torch.float32, torch.float16):
        as_tensors = torch.tensor(mean, dtype=dtype), torch.tensor(std, dtype=dtype)
        assert torch.equal(fk.patchify_gather(images, None, 2, *as_tensors), expected)
    strided = torch.tensor([mean, std]).t().contiguous().t()
    assert torch.equal(fk.patchify_gather(images, None, 2, strided[0], strided[1]), expected)
    assert torch.equal(fk.patchify_gather(images, None, 2, list(mean), torch.tensor(std)), expected)


@each_implementation
@pytest.mark.usefixtures("use")
def test_nothing_is_asked_of_nothing() -> None:
    images = torch.zeros(2, 3, 4, 4, dtype=torch.uint8)
    assert fk.patchify_gather(images, torch.zeros(2, 0, dtype=torch.long), 2).shape == (2, 0, 12)
    assert fk.patchify_gather(images[:0], None, 2).shape == (0, 4, 12)
    starts = torch.zeros(3, dtype=torch.int32)
    empty = torch.zeros(0, dtype=torch.long)
    assert fk.patchify_gather(images, empty, 2, cu_seqlens=starts).shape == (0, 12)
    assert bool(
        (fk.patchify_gather(images, torch.zeros(3).long(), 2, (1,) * 3, cu_seqlens=starts) == 0).all()
    )


@each_implementation
@pytest.mark.usefixtures("use")
def test_without_mean_and_std_pixels_stay_as_they_are() -> None:
    images = torch.randint(256, (2, 3, 4, 4), dtype=torch.uint8)
    floats = images / 255
    assert torch.equal(fk.patchify_gather(floats, None, 4).view(2, 3, 4, 4), floats)
    torch.testing.assert_close(fk.patchify_gather(images, None, 4).view(2, 3, 4, 4), floats)
    only_mean = fk.patchify_gather(floats, None, 4, mean=(0.5,) * 3).view(2, 3, 4, 4)
    torch.testing.assert_close(only_mean, floats - 0.5)
    only_std = fk.patchify_gather(floats, None, 4, std=torch.full((3,), 0.5)).view(2, 3, 4, 4)
    torch.testing.assert_close(only_std, floats * 2)


@each_implementation
@pytest.mark.usefixtures("use")
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


@each_implementation
@pytest.mark.usefixtures("use")
def test_packed_images_of_unequal_length_and_of_none() -> None:
    images = torch.randint(256, (3, 1, 4, 6), dtype=torch.uint8)
    lists = [[5, 0, 2], [], [1]]
    starts = torch.tensor([0, 3, 3, 4], dtype=torch.int32)
    index = torch.tensor([*lists[0], *lists[2], 0])  # and one row past the end
    out = fk.patchify_gather(images, index, 2, MEAN[:1], STD[:1], cu_seqlens=starts)
    assert out.shape == (5, 4)
    for image, (start, end) in enumerate(pairwise(starts.tolist())):
        kept = torch.tensor(lists[image], dtype=torch.uint8)[None]
        alone = fk.patchify_gather(images[image : image + 1], kept, 2, MEAN[:1], STD[:1])
        assert torch.equal(out[start:end], alone[0])
    assert bool((out[4] == 0).all())


@pytest.mark.parametrize("implementation", [name for name in IMPLEMENTATIONS if name == "triton"])
@pytest.mark.usefixtures("use", "poisoned")
def test_on_a_gpu_an_index_out_of_range_reads_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    # Where a look at the values would wait for the device, they are not checked.
    monkeypatch.setattr("fastjepa_kernels.patchify.require_index_values", lambda *_arguments: None)
    images = torch.randint(256, (2, 3, 4, 6), dtype=torch.uint8)
    index = torch.tensor([[5, 2**40, -1], [6, 0, -(2**31)]])
    out = fk.patchify_gather(images, index, 2, MEAN[:3], STD[:3])
    inside = (index >= 0) & (index < 6)
    expected = fk.patchify_gather(images, index.where(inside, 0), 2, MEAN[:3], STD[:3])
    assert torch.equal(out, expected * inside[..., None])


@each_implementation
@pytest.mark.usefixtures("use")
def test_there_is_no_gradient() -> None:
    images = torch.rand(1, 1, 4, 4, requires_grad=True)
    assert not fk.patchify_gather(images, None, 2).requires_grad


@each_implementation
@pytest.mark.usefixtures("use")
@pytest.mark.parametrize("way", ["all", "dense", "packed"])
def test_the_op_is_registered_as_torch_wants_it(way: str) -> None:
    images = torch.randint(256, (2, 3, 4, 6), dtype=torch.uint8)
    index = {"all": None, "dense": torch.tensor([[5, 0], [3, 3]]), "packed": torch.tensor([5, 0, 3])}[way]
    starts = torch.tensor([0, 1, 3], dtype=torch.int32) if way == "packed" else None
    std = torch.tensor(STD[:3]) if way == "dense" else None
    arguments: tuple[Any, ...] = (images, index, 2, torch.tensor(MEAN[:3]), std, torch.float32, starts)
    torch.library.opcheck(torch.ops.fastjepa.patchify_gather, (*arguments, fk.choice.preference()))


@each_implementation
@pytest.mark.usefixtures("use")
@pytest.mark.parametrize("as_tensors", [False, True])
def test_it_compiles_without_a_break(as_tensors: bool) -> None:
    images = torch.rand(2, 3, 4, 6, requires_grad=True)
    weight = torch.randn(5, 12, requires_grad=True)
    index = torch.tensor([[5, 0], [3, 3]], dtype=torch.int16)
    mean, std = (torch.tensor(MEAN[:3]), torch.tensor(STD[:3])) if as_tensors else (MEAN[:3], STD[:3])

    def embed(images: Tensor, weight: Tensor) -> Tensor:
        return F.linear(fk.patchify_gather(images, index, 2, mean, std), weight).square().sum()

    compiled = torch.compile(embed, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(images, weight), embed(images, weight))
    (expected,) = torch.autograd.grad(embed(images, weight), weight)
    (found,) = torch.autograd.grad(compiled(images, weight), weight)
    torch.testing.assert_close(found, expected)


@each_implementation
@pytest.mark.usefixtures("use")
def test_nothing_to_read_gives_zeros() -> None:
    index, starts = torch.zeros(5, dtype=torch.long), torch.zeros(1, dtype=torch.int32)
    none = fk.patchify_gather(torch.zeros(0, 3, 4, 4), index[:0], 2, cu_seqlens=starts)
    assert none.shape == (0, 12)
    assert fk.patchify_gather(torch.zeros(2, 3, 0, 4), None, 2).shape == (2, 0, 12)
    assert fk.patchify_gather(torch.zeros(2, 3, 4, 4), index.view(5, 1)[:2, :0], 2).shape == (2, 0, 12)


@pytest.mark.parametrize("implementation", ["triton"])
@pytest.mark.usefixtures("use", "poisoned")
def test_on_a_gpu_wrong_cu_seqlens_read_nothing_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastjepa_kernels.patchify.require_cu_seqlens_values", lambda *_arguments: None)
    images, index = torch.rand(2, 1, 4, 4), torch.tensor([0, 3, 1])
    expected = fk.patchify_gather(images, index, 2, cu_seqlens=torch.tensor([0, 1, 3], dtype=torch.int32))
    beyond = torch.tensor([0, 1, 5000], dtype=torch.int32)
    assert torch.equal(fk.patchify_gather(images, index, 2, cu_seqlens=beyond), expected)


def test_flop_counters_see_it() -> None:
    with FlopCounterMode(display=False) as counter:
        fk.patchify_gather(torch.rand(2, 3, 4, 6), None, 2)
    assert counter.get_flop_counts()["Global"][torch.ops.fastjepa.patchify_gather] == 0


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
        ({"mean": 0.5}, r"mean must have one value for each of 3 channels, got 0\.5"),
        ({"patch_size": 2.0}, r"patch_size must be a whole number of pixels, got 2\.0"),
        ({"patch_size": (2, 2)}, r"patch_size must be a whole number of pixels, got \(2, 2\)"),
        ({"std": torch.ones(4)}, "std must have one value for each of 3 channels"),
        ({"mean": torch.ones(3, 1, 1)}, "mean must have one value for each of 3 channels"),
        ({"mean": torch.tensor(0.5)}, "mean must have one value for each of 3 channels"),
        ({"index": INDEX + 6}, r"index must lie in 0\.\.5, got 6\.\.6"),
        ({"index": INDEX - 1}, r"index must lie in 0\.\.5"),
        ({"index": INDEX.float()}, "index must hold integers"),
        ({"index": INDEX[:1]}, r"index must be \[B, K\] with B = 2"),
        ({"index": None, "cu_seqlens": STARTS}, "cu_seqlens needs a packed index"),
        ({"cu_seqlens": STARTS}, r"with cu_seqlens, index must be \[T\]"),
        ({"index": INDEX.flatten(), "cu_seqlens": STARTS[:2]}, r"B \+ 1 = 3 entries, got 2"),
        ({"index": INDEX.flatten(), "cu_seqlens": STARTS + 1}, "must start at 0"),
        ({"index": INDEX.flatten(), "cu_seqlens": STARTS[[0, 2, 1]]}, "never decrease"),
        ({"index": INDEX.flatten()[:3], "cu_seqlens": STARTS}, "ends at 4, but there are only 3"),
        ({"index": INDEX.to("meta")}, "one device, got images on cpu, index on meta"),
    ],
)
def test_wrong_arguments_are_named(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fk.patchify_gather(**{"images": IMAGES, "index": INDEX, "patch_size": 2, **arguments})
