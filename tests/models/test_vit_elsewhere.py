"""The encoder computes what timm's and transformers' vision transformers compute with its weights."""

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer as TimmViT
from torch import Tensor
from transformers import IJepaConfig, IJepaModel

from fastjepa.models import VisionTransformer, ViTShape


def encoder(shape: ViTShape) -> VisionTransformer:
    """With weights that leave no bias at 0 and no norm at 1."""
    torch.manual_seed(0)
    model = VisionTransformer(shape)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) / 10)
    return model


def assert_close(one: Tensor, other: Tensor) -> None:
    assert one.std() > 0.1
    torch.testing.assert_close(one, other, rtol=0, atol=1e-5)


@pytest.mark.parametrize("class_token", [False, True])
@pytest.mark.parametrize(("width", "heads", "mlp_ratio"), [(128, 2, 4.0), (80, 1, 4.0), (176, 2, 48 / 11)])
def test_timm_agrees(class_token: bool, width: int, heads: int, mlp_ratio: float) -> None:
    ours = encoder(ViTShape((16, 24), 4, width, 3, heads, mlp_ratio, class_token=class_token))
    theirs = TimmViT(
        img_size=(16, 24),
        patch_size=4,
        num_classes=0,
        embed_dim=width,
        depth=3,
        num_heads=heads,
        mlp_ratio=mlp_ratio,
        class_token=class_token,
        global_pool="token" if class_token else "avg",
        fc_norm=False,
    )
    theirs.load_state_dict(ours.state_dict())
    images = torch.randn(2, 3, 16, 24)
    with torch.no_grad():
        assert_close(ours(images), theirs.forward_features(images))


def test_transformers_agrees() -> None:
    ours = encoder(ViTShape((32, 32), 8, 160, 3, 2))
    config = IJepaConfig(
        hidden_size=160,
        num_hidden_layers=3,
        num_attention_heads=2,
        intermediate_size=640,
        image_size=32,
        patch_size=8,
        layer_norm_eps=1e-6,
    )
    theirs = IJepaModel(config, add_pooling_layer=False).eval()
    theirs.load_state_dict(in_transformers_names(ours.state_dict()))
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert_close(ours(images), theirs(images).last_hidden_state)


def in_transformers_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    renamed: dict[str, Tensor] = {}
    for name, tensor in state.items():
        for ours, theirs in (
            ("pos_embed", "embeddings.position_embeddings"),
            ("patch_embed.proj", "embeddings.patch_embeddings.projection"),
            ("blocks", "layers"),
            ("norm1", "layernorm_before"),
            ("norm2", "layernorm_after"),
            ("attn.proj", "attention.o_proj"),
            ("attn.qkv", "attention.qkv"),
        ):
            name = name.replace(ours, theirs)
        if ".qkv" in name:
            for part, rows in zip("qkv", tensor.chunk(3), strict=True):
                renamed[name.replace("qkv", f"{part}_proj")] = rows
        else:
            renamed[name.replace("norm.", "layernorm.") if name.startswith("norm.") else name] = tensor
    return renamed
