"""More elements than 32 bits can count."""

from collections.abc import Iterator

import pytest
import torch

import fastjepa_kernels as fk

IMAGES, PATCHES, WIDTH = 3, 1100, 1 << 20  # 3.5e9 elements


@pytest.fixture(autouse=True)
def roomy() -> Iterator[None]:
    """Skips where too little memory is free, and leaves none behind."""
    torch.cuda.empty_cache()
    if torch.cuda.mem_get_info()[0] < 40 << 30:
        pytest.skip("needs 40 GiB of free memory")
    yield
    torch.cuda.empty_cache()


def test_gather_tokens_and_its_gradient() -> None:
    x = torch.randn(IMAGES, PATCHES, WIDTH, dtype=torch.float16, device="cuda", requires_grad=True)
    index = torch.stack([torch.randperm(PATCHES, device="cuda") for _ in range(IMAGES)])  # [B, N]
    with fk.use("triton", strict=True):
        out = fk.gather_tokens(x, index)
    for image in range(IMAGES):
        assert torch.equal(out[image], x[image, index[image]])
    (gradient,) = torch.autograd.grad(out, x, out.detach())
    assert torch.equal(gradient, x), "every row goes back to where it is from"


def test_ema_update_of_one_flat_tensor() -> None:
    elements = (1 << 31) + 12_345
    shadow = torch.randn(elements, device="cuda")
    source = torch.randn(elements, dtype=torch.bfloat16, device="cuda")
    ends = [slice(0, 1000), slice((1 << 31) - 500, (1 << 31) + 500), slice(elements - 1000, elements)]
    expected = [shadow[end].lerp(source[end].float(), 1 - 0.9) for end in ends]
    with fk.use("triton", strict=True):
        fk.ema_update_(shadow, source, 0.9)
    for end, right in zip(ends, expected, strict=True):
        torch.testing.assert_close(shadow[end], right)
