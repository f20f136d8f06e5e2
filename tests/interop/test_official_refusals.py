from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fastjepa.interop import load_official, save_official
from fastjepa.models import MAEDecoder, Predictor, VisionTransformer, ViTShape
from fastjepa.models.block import Block
from fastjepa.objectives import JEPA, MAE

Content = dict[str, Any]


def jepa(width: int = 192) -> JEPA:
    shape = ViTShape((12, 12), 4, width, depth=2, heads=width // 64)
    return JEPA(VisionTransformer(shape), Predictor(shape.grid, width, 96, 1, 3))


def mae(decoder_width: int = 512) -> MAE:
    shape = ViTShape((12, 12), 4, 192, depth=1, heads=3, class_token=True)
    return MAE(VisionTransformer(shape), MAEDecoder(shape, decoder_width, 1, 4))


def altered(model: JEPA | MAE, path: Path, change: Callable[[Content], Any]) -> Path:
    """The file of `model`, changed."""
    save_official(model, path)
    content = torch.load(path, weights_only=True)
    change(content)
    torch.save(content, path)
    return path


@pytest.mark.parametrize("network", ["encoder", "predictor", "target_encoder"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state, name: state.pop(name), "{name} is missing"),
        (lambda state, name: state.update({"module.extra": torch.zeros(1)}), "extra is unexpected"),
        (lambda state, name: state.update({name: torch.zeros(5)}), r"{name} is \[5\] and should be \["),
    ],
)
def test_a_tensor_that_does_not_fit_is_named(
    network: str, change: Callable[[Content, str], Any], message: str, tmp_path: Path
) -> None:
    name = "predictor_norm.bias" if network == "predictor" else "blocks.1.norm2.bias"
    path = altered(jepa(), tmp_path / "file", lambda content: change(content[network], f"module.{name}"))
    with pytest.raises(ValueError, match=f"tensors of {network} do not fit: {message.format(name=name)}"):
        load_official(path)


def test_many_misfits_are_not_all_listed(tmp_path: Path) -> None:
    def drop_a_block(content: Content) -> None:
        state = content["target_encoder"]
        for name in [name for name in state if ".blocks.1." in name]:
            del state[name]

    with pytest.raises(ValueError, match=r"blocks\.1\.\S+ is missing.*; and 6 more"):
        load_official(altered(jepa(), tmp_path / "file", drop_a_block))


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("patch_embed.proj.weight", None, "patch_embed.proj.weight is missing: this is no I-JEPA or MAE"),
        ("patch_embed.proj.weight", torch.zeros(192, 48), r"is \[192, 48\] and should have 4 dimensions"),
        ("pos_embed", torch.zeros(9, 192), r"pos_embed is \[9, 192\] and should have 3 dimensions"),
        ("pos_embed", torch.zeros(1, 7, 192), "7 patches, which is no square and no sine-cosine table"),
        ("blocks.0.mlp.fc1.weight", None, "blocks.0.mlp.fc1.weight is missing"),
    ],
)
def test_what_the_architecture_is_read_off_must_be_there(
    name: str, value: torch.Tensor | None, message: str, tmp_path: Path
) -> None:
    def change(content: Content) -> None:
        del content["encoder"]["module." + name]
        if value is not None:
            content["encoder"]["module." + name] = value

    with pytest.raises(ValueError, match=message):
        load_official(altered(jepa(), tmp_path / "file", change))


def test_an_unknown_width_needs_heads(tmp_path: Path) -> None:
    altered(jepa(width=128), tmp_path / "jepa", lambda content: content.pop("fastjepa_heads"))
    said = r"width 128 are not known: give heads=, or --heads. Known: 192 \(3 heads\)"
    with pytest.raises(ValueError, match=said):
        load_official(tmp_path / "jepa")
    model = load_official(tmp_path / "jepa", heads=4, predictor_heads=2)
    assert model.encoder.shape.heads == 4

    altered(mae(decoder_width=64), tmp_path / "mae", lambda content: content.pop("fastjepa_heads"))
    said = "decoder of width 64 are not known: give decoder_heads=, or --heads N,M"
    with pytest.raises(ValueError, match=said):
        load_official(tmp_path / "mae")
    loaded = load_official(tmp_path / "mae", decoder_heads=2)
    assert isinstance(loaded, MAE)
    assert loaded.decoder is not None
    block = loaded.decoder.decoder_blocks[0]
    assert isinstance(block, Block)
    assert block.attn.heads == 2


@pytest.mark.parametrize("heads", [0, -1, 5, 48])
@pytest.mark.parametrize("which", ["heads", "predictor_heads", "decoder_heads"])
def test_heads_that_do_not_fit_are_refused(which: str, heads: int, tmp_path: Path) -> None:
    save_official(mae() if which == "decoder_heads" else jepa(), tmp_path / "file")
    with pytest.raises(ValueError, match=f"^{which} is {heads}, which does not fit .* allowed: .1, "):
        load_official(tmp_path / "file", **{which: heads})


def test_a_decoder_that_does_not_fit_is_named(tmp_path: Path) -> None:
    path = altered(mae(), tmp_path / "file", lambda content: content["model"].pop("decoder_norm.bias"))
    with pytest.raises(ValueError, match=r"decoder_norm\.bias is missing"):
        load_official(path)
