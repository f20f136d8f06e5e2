from collections.abc import Sequence
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.layers import PatchEmbed
from timm.layers.attention import Attention
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import fastjepa_kernels as fk
from fastjepa_kernels.nn import equal_lengths

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def cu_seqlens_of(lengths: Sequence[int]) -> Tensor:
    return F.pad(torch.tensor(lengths).cumsum(0), (1, 0)).int()


def gradients(module: nn.Module) -> dict[str, Tensor]:
    found = {name: parameter.grad for name, parameter in module.named_parameters()}
    return {name: gradient for name, gradient in found.items() if gradient is not None}


@settings(deadline=None, max_examples=20)
@given(
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=4),
    heads=st.integers(1, 3),
    head_dim=st.sampled_from([8, 24]),
    qkv_bias=st.booleans(),
    proj_bias=st.booleans(),
)
def test_attention_is_timms_for_each_sequence(
    lengths: list[int], heads: int, head_dim: int, qkv_bias: bool, proj_bias: bool
) -> None:
    width = heads * head_dim
    theirs = Attention(
        width, heads, qkv_bias=qkv_bias, proj_bias=proj_bias, device="cpu", dtype=torch.float64
    )
    ours = fk.nn.PackedAttention(width, heads, qkv_bias, proj_bias, dtype=torch.float64)
    ours.load_state_dict(theirs.state_dict())
    # One sequence more, without a token.
    x = torch.randn(sum(lengths), width, dtype=torch.float64, requires_grad=True)
    out = ours(x, cu_seqlens_of([*lengths, 0]), max(lengths) + 1)
    expected = torch.cat([theirs(part[None])[0] for part in x.split(lengths)])
    torch.testing.assert_close(out, expected)

    ahead = torch.randn_like(out)
    (to_x,) = torch.autograd.grad(out, x, ahead, retain_graph=True)
    (expected_to_x,) = torch.autograd.grad(expected, x, ahead, retain_graph=True)
    torch.testing.assert_close(to_x, expected_to_x)
    out.backward(ahead, inputs=list(ours.parameters()))
    expected.backward(ahead, inputs=list(theirs.parameters()))
    torch.testing.assert_close(gradients(ours), gradients(theirs))


def test_a_dense_batch_is_sequences_of_one_length() -> None:
    module = fk.nn.PackedAttention(32, 2)
    x = torch.randn(3, 5, 32)
    packed = module(x.flatten(0, 1), cu_seqlens_of([5, 5, 5]), 5)
    torch.testing.assert_close(module(x), packed.unflatten(0, (3, 5)))
    assert module(x[:0]).shape == (0, 5, 32)
    assert module(x[:, :0]).shape == (3, 0, 32)


def test_equal_lengths_are_made_once() -> None:
    like = torch.empty(1)
    made = equal_lengths(like, 3, 7)
    assert made.tolist() == [0, 7, 14, 21]
    assert made.dtype == torch.int32
    assert equal_lengths(like, 3, 7) is made
    assert equal_lengths(like.to("meta"), 3, 7).device.type == "meta"


def test_equal_lengths_of_inference_mode_serve_training() -> None:
    module = fk.nn.PackedAttention(16, 1)
    x = torch.randn(2, 11, 16)  # of a size that no other test has
    with torch.inference_mode():
        module(x)
    module(x).sum().backward()
    assert gradients(module).keys() == {"qkv.weight", "qkv.bias", "proj.weight", "proj.bias"}


def test_equal_lengths_do_not_mix_with_traced_tensors() -> None:
    with FakeTensorMode():
        fake = equal_lengths(torch.empty(1), 2, 13)
    real = equal_lengths(torch.empty(1), 2, 13)
    assert type(real) is Tensor
    with FakeTensorMode():
        assert type(equal_lengths(torch.empty(1), 2, 13)) is type(fake)


@pytest.mark.parametrize(
    ("width", "heads", "said"),
    [
        (40, 2, "multiple of 8 up to 128, got 40 / 2 = 20"),
        (272, 2, "multiple of 8 up to 128, got 272 / 2 = 136"),
        (30, 4, "multiple of heads, got width 30 and 4 heads"),
        (32, 0, "multiple of heads, got width 32 and 0 heads"),
    ],
)
def test_widths_of_other_head_dims_are_refused(width: int, heads: int, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        fk.nn.PackedAttention(width, heads)


def test_attention_names_a_bad_argument() -> None:
    module = fk.nn.PackedAttention(16, 2)
    cu_seqlens = cu_seqlens_of([3, 4])
    with pytest.raises(ValueError, match=r"x must be \[B, N, D\]"):
        module(torch.randn(7, 16))
    with pytest.raises(ValueError, match=r"x must be \[T, D\] with D = 16, got \[1, 7, 16\]"):
        module(torch.randn(1, 7, 16), cu_seqlens, 4)
    with pytest.raises(ValueError, match="D = 16"):
        module(torch.randn(7, 24), cu_seqlens, 4)
    with pytest.raises(ValueError, match="go together"):
        module(torch.randn(7, 16), cu_seqlens)
    with pytest.raises(ValueError, match="go together"):
        module(torch.randn(1, 7, 16), max_seqlen=7)
    with pytest.raises(ValueError, match="max_seqlen"):
        module(torch.randn(7, 16), cu_seqlens, 3)


def test_modules_take_device_and_dtype() -> None:
    factory: dict[str, Any] = {"device": "meta", "dtype": torch.bfloat16}
    for module in (fk.nn.PackedAttention(16, 2, **factory), fk.nn.MaskedPatchEmbed(4, 3, 16, **factory)):
        assert {(p.device.type, p.dtype) for p in module.parameters()} == {("meta", torch.bfloat16)}


@settings(deadline=None, max_examples=20)
@given(kept=st.integers(1, 8), bias=st.booleans(), raw=st.booleans())
def test_patch_embedding_is_timms_of_the_kept_patches(kept: int, bias: bool, raw: bool) -> None:
    theirs = PatchEmbed(None, 4, 3, 10, bias=bias, strict_img_size=False).double()
    ours = fk.nn.MaskedPatchEmbed(4, 3, 10, MEAN, STD, bias=bias, dtype=torch.float64)
    ours.load_state_dict(theirs.state_dict())
    pixels = torch.randint(256, (2, 3, 8, 16), dtype=torch.uint8)
    scaled = pixels.double() / 255
    mean, std = (torch.tensor(values, dtype=torch.float64)[:, None, None] for values in (MEAN, STD))
    images = pixels if raw else scaled
    everything = theirs((scaled - mean) / std)  # [B, N, D]
    torch.testing.assert_close(ours(images), everything)

    index = torch.randint(8, (2, kept))
    expected = everything.gather(1, index[:, :, None].expand(-1, -1, 10))  # [B, K, D]
    out = ours(images, index)
    torch.testing.assert_close(out, expected)
    packed = ours(images, index.flatten(), cu_seqlens_of([kept, kept]))
    torch.testing.assert_close(packed, expected.flatten(0, 1))

    ahead = torch.randn_like(out)
    out.backward(ahead)
    expected.backward(ahead)
    torch.testing.assert_close(gradients(ours), gradients(theirs))


def test_patch_embedding_of_a_whole_timm_model_loads() -> None:
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=1)
    ours = fk.nn.MaskedPatchEmbed(16, 3, 192)
    ours.load_state_dict(model.patch_embed.state_dict())
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(ours(images), model.patch_embed(images))


def test_patches_are_written_in_the_dtype_of_autocast(monkeypatch: pytest.MonkeyPatch) -> None:
    taken = []

    def patchify_gather(*arguments: object) -> Tensor:
        patches = fk.patchify_gather(*arguments)  # type: ignore[arg-type]
        taken.append(patches.dtype)
        return patches

    monkeypatch.setattr(fk.nn, "patchify_gather", patchify_gather)
    module = fk.nn.MaskedPatchEmbed(4, 3, 16)
    images = torch.randint(256, (2, 3, 8, 8), dtype=torch.uint8)
    with torch.autocast("cpu", torch.bfloat16):
        assert module(images).dtype == torch.bfloat16
    assert module(images).dtype == torch.float32
    assert module.half()(images).dtype == torch.float16
    assert taken == [torch.bfloat16, torch.float32, torch.float16]


def test_autocast_leaves_float64_alone() -> None:
    module = fk.nn.MaskedPatchEmbed(4, 3, 16, dtype=torch.float64)
    images = torch.rand(2, 3, 8, 8, dtype=torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        out = module(images)
        expected = module.proj(images).flatten(2).transpose(1, 2)  # [B, N, D]
    assert out.dtype == expected.dtype == torch.float64
    torch.testing.assert_close(out, expected)


def test_patch_embedding_names_a_bad_argument() -> None:
    module = fk.nn.MaskedPatchEmbed(4, 3, 16)
    with pytest.raises(ValueError, match=r"images must be \[B, 3, H, W\], got \[2, 1, 8, 8\]"):
        module(torch.randn(2, 1, 8, 8))
    images = torch.randn(2, 3, 8, 8, requires_grad=True)
    with pytest.raises(ValueError, match="images must not require a gradient"):
        module(images)
    with torch.no_grad():
        assert module(images).shape == (2, 4, 16)
    with pytest.raises(ValueError, match="patch_size must divide"):
        module(torch.randn(2, 3, 8, 9))
    with pytest.raises(ValueError, match=r"index must lie in 0\.\.3"):
        module(images.detach(), torch.tensor([[0], [4]]))
    with pytest.raises(ValueError, match="std must have one value for each of 3 channels"):
        fk.nn.MaskedPatchEmbed(4, 3, 16, MEAN, STD[:2])


def test_modules_compile_without_a_break() -> None:
    attention = fk.nn.PackedAttention(16, 2)
    embed = fk.nn.MaskedPatchEmbed(4, 3, 16, MEAN, STD)
    images, index = torch.randint(256, (2, 3, 8, 8), dtype=torch.uint8), torch.tensor([[3, 0, 1], [1, 2, 2]])

    def step(images: Tensor, index: Tensor) -> Tensor:
        dense = attention(embed(images, index))  # [B, K, D]
        return attention(dense.flatten(0, 1), cu_seqlens_of_six, 4)

    cu_seqlens_of_six = cu_seqlens_of([4, 2])
    expected = step(images, index)
    expected.sum().backward()
    by_hand = gradients(embed)
    embed.zero_grad()
    out = torch.compile(step, fullgraph=True, backend="aot_eager")(images, index)
    torch.testing.assert_close(out, expected)
    out.sum().backward()
    torch.testing.assert_close(gradients(embed), by_hand)
