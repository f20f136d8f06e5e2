"""Encoders of timm and Hugging Face, real and small, with weights from files."""

import json
import shutil
from pathlib import Path

import pytest
import timm
import torch
import transformers
from safetensors.torch import save_file

from fastjepa.data.fashion_mnist import FashionMNIST
from fastjepa.probe.extract import as_channels
from fastjepa.probe.others import other_subject
from fastjepa.probe.subjects import ProbeError, Subject

CPU, FP32 = torch.device("cpu"), torch.float32
NAME = "test_vit"  # timm's own for tests: 6 blocks of width 64 on 160 pixels


def opened(given: str, blocks: int = 2) -> Subject:
    return other_subject(given, blocks, CPU, FP32)


@pytest.fixture(scope="module")
def vit(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, transformers.ViTModel]:
    """A ViT of transformers on 28-pixel grey images, and where it was saved."""
    torch.manual_seed(0)
    config = transformers.ViTConfig(
        image_size=28, patch_size=7, num_channels=1, hidden_size=32, num_hidden_layers=3,
        num_attention_heads=2, intermediate_size=64,
    )  # fmt: skip
    model = transformers.ViTModel(config).eval()
    folder = tmp_path_factory.mktemp("hf")
    model.save_pretrained(folder)
    processor = transformers.ViTImageProcessor(image_mean=[0.25], image_std=[0.5])
    processor.save_pretrained(folder)
    return folder, model


def test_of_transformers(vit: tuple[Path, transformers.ViTModel]) -> None:
    folder, model = vit
    subject = opened(f"hf:{folder}")
    assert (subject.size, subject.channels, subject.tokens, subject.width) == (28, 1, 16, 32)
    images = FashionMNIST(split="test").images[:3]
    before, last = subject.blocks(images)
    with torch.no_grad():
        wanted = model((images.float() / 255 - 0.25) / 0.5, output_hidden_states=True)
    torch.testing.assert_close(last, wanted.last_hidden_state[:, 1:])
    torch.testing.assert_close(before, model.layernorm(wanted.hidden_states[-2])[:, 1:].detach())


def test_an_mae_of_transformers_sees_every_patch(tmp_path: Path) -> None:
    config = transformers.ViTMAEConfig(
        image_size=28, patch_size=7, num_channels=1, hidden_size=32, num_hidden_layers=2,
        num_attention_heads=2, intermediate_size=64,
    )  # fmt: skip
    transformers.ViTMAEModel(config).save_pretrained(tmp_path)
    subject = opened(f"hf:{tmp_path}")
    assert subject.tokens == 16
    images = FashionMNIST(split="test").images[:3]
    # Their order is drawn at random there; what is in them is not.
    first, second = (subject.blocks(images)[-1].mean(dim=1) for _ in range(2))
    torch.testing.assert_close(first, second)


def test_of_timm_with_weights_from_a_file(tmp_path: Path) -> None:
    torch.manual_seed(1)
    model = timm.create_model(NAME, num_classes=0).eval()
    file = tmp_path / "weights.safetensors"
    save_file(model.state_dict(), file)
    subject = opened(f"timm:{NAME}={file}")
    assert (subject.channels, subject.width) == (3, 64)
    images = torch.randint(256, (2, 3, subject.size, subject.size), dtype=torch.uint8)
    mean, std = (torch.tensor(model.pretrained_cfg[key])[:, None, None] for key in ("mean", "std"))
    with torch.no_grad():
        wanted = model.forward_features((images.float() / 255 - mean) / std)
    torch.testing.assert_close(subject.blocks(images)[-1], wanted[:, model.num_prefix_tokens :])
    assert subject.fingerprint == opened(f"timm:{NAME}={file}").fingerprint


def test_what_is_refused_says_what_to_do(
    vit: tuple[Path, transformers.ViTModel], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    pickle = tmp_path / "weights.bin"
    torch.save({}, pickle)
    deeper = tmp_path / "deeper"
    shutil.copytree(vit[0], deeper)
    config = json.loads((deeper / "config.json").read_text())
    (deeper / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 4}))
    resnet = timm.create_model("test_resnet", num_classes=0)
    file = tmp_path / "resnet.safetensors"
    save_file(resnet.state_dict(), file)
    for given, blocks, said in (
        ("vit_small", 2, "is none of timm:NAME"),
        ("hf:", 2, "is none of timm:NAME"),
        ("timm:vit_smal_patch16_224", 2, "timm has no model vit_smal_patch16_224"),
        (f"timm:{NAME}={pickle}", 2, "is no .safetensors file, and nothing else is read"),
        (f"timm:{NAME}={tmp_path}/no.safetensors", 2, "is no .safetensors file"),
        (f"timm:{NAME}={file}", 2, "are not at hand .* tensors of the model are not in it"),
        (f"timm:test_resnet={file}", 2, "has no transformer blocks"),
        (f"hf:{tmp_path}/nowhere", 2, "there is no folder"),
        (f"hf:{tmp_path}", 2, "are not at hand"),
        (f"hf:{deeper}", 2, "are not at hand .* tensors of the model are not in it, layers.3"),
        (f"hf:{vit[0]}", 4, "the last 4 blocks are asked for, and the hf:.* has 3: use --blocks 3"),
    ):
        with pytest.raises(ProbeError, match=said):
            opened(given, blocks)


def test_grey_images_serve_encoders_of_colours_and_not_the_reverse() -> None:
    grey = torch.randint(256, (2, 1, 8, 8), dtype=torch.uint8)
    assert torch.equal(as_channels(grey, 3), grey.repeat(1, 3, 1, 1))
    assert as_channels(grey, 1) is grey
    with pytest.raises(ProbeError, match=r"takes 1 channel\(s\), and these images have 3"):
        as_channels(grey.repeat(1, 3, 1, 1), 1)
