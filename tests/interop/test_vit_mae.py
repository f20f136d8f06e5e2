"""An MAE and its decoder in transformers, beside our own: what is hidden, what is painted, and the loss."""

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from fastjepa.cli import main
from fastjepa.data.fashion_mnist import FashionMNIST
from fastjepa.interop import to_vit_mae
from fastjepa.interop.export import TOLERANCE, export, prepare
from fastjepa.interop.formats import FORMATS
from fastjepa.interop.provenance import Provenance
from fastjepa.interop.staging import ExportError
from fastjepa.interop.start import load_trained
from fastjepa.interop.vit_mae import noise_for, run_mae
from fastjepa.objectives import MAE
from tests.interop.handing_over import images, jepa, mae, picture, run_alone

if TYPE_CHECKING:
    from tests.conftest import Trainer

FORM = next(form for form in FORMATS if form.name == "transformers-mae")
ORIGIN = Provenance("weights.pth.tar")
LIMIT = 1e-5


def normalised(model: MAE, pixels: Tensor) -> Tensor:
    values = (model.encoder.pixel_mean, model.encoder.pixel_std)
    mean, std = (torch.tensor(value).view(-1, 1, 1) for value in values)
    return (pixels / 255 - mean) / std


@pytest.mark.parametrize("norm_pix_loss", [True, False])
@pytest.mark.parametrize(("channels", "mask_ratio"), [(3, 0.75), (1, 0.6)])
@torch.no_grad()
def test_the_same_patches_are_hidden_and_the_loss_is_the_same(
    channels: int, mask_ratio: float, norm_pix_loss: bool
) -> None:
    model = mae(channels, (24, 24), mask_ratio, norm_pix_loss)
    pixels, noise = images(model.encoder.shape), torch.rand(4, 36, generator=torch.Generator().manual_seed(7))
    theirs = to_vit_mae(model)
    found = theirs(normalised(model, pixels), noise=noise)

    order, kept = noise.argsort(dim=1), int(36 * (1 - mask_ratio))
    loss, prediction, _ = model(pixels, order[:, :kept], order[:, kept:], norm_pix_loss)
    assert prediction.std() > 0.3, "pixels that are all alike would fit anything"
    assert (found.logits - prediction).abs().max() < LIMIT * prediction.abs().max()
    assert abs(found.loss - loss) < LIMIT * max(1, loss)
    hidden = torch.stack([row.nonzero()[:, 0] for row in found.mask])  # [B, N - K]
    assert torch.equal(hidden, order[:, kept:].sort(dim=1).values)
    assert (theirs.config.mask_ratio, theirs.config.norm_pix_loss) == (mask_ratio, norm_pix_loss)


@torch.no_grad()
def test_it_has_weights_of_its_own() -> None:
    model = mae()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for tensor in to_vit_mae(model).state_dict().values():
        tensor.fill_(9)
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in before.items())


ALONE = """
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoImageProcessor, AutoModelForPreTraining, ViTMAEForPreTraining, ViTMAEModel

given = load_file("given.safetensors")

def check(name, found):
    assert given[name].shape == found.shape, (name, found.shape)
    worst = (given[name] - found).abs().max().item() / max(1, given[name].abs().max().item())
    assert worst < 1e-5, (name, worst)

processor = AutoImageProcessor.from_pretrained("out")
inputs = processor(Image.open("image.png"), return_tensors="pt")
model = ViTMAEForPreTraining.from_pretrained("out").eval()
assert type(AutoModelForPreTraining.from_pretrained("out")) is ViTMAEForPreTraining
with torch.no_grad():
    found = model(**inputs, noise=given["noise"])
    check("pixels", found.logits)
    check("mask", found.mask)
    check("loss", found.loss)
    in_order = torch.arange(given["noise"].shape[1])[None]
    encoder = ViTMAEModel.from_pretrained("out", mask_ratio=0.0).eval()
    check("tokens", encoder(**inputs, noise=in_order).last_hidden_state)
for name, p in model.named_parameters(): p.requires_grad_("pos" not in name)  # as the guide has it
model.train()(**inputs).loss.backward()
without = [name for name, parameter in model.named_parameters() if parameter.grad is None]
assert without == ["vit.embeddings.position_embeddings", "decoder.decoder_pos_embed"], without
"""


def given_alone(model: MAE, pixels: Tensor, path: Path) -> None:
    """What `ALONE` compares with: what we make of uint8 pixels [1, C, H, W]."""
    tokens, painted, mask, loss = run_mae(model, pixels)
    given = {"tokens": tokens, "pixels": painted, "mask": mask, "loss": loss}
    save_file(given | {"noise": noise_for(1, mask.shape[1])}, path)


@pytest.mark.slow
def test_transformers_reads_it_where_fastjepa_is_not(tmp_path: Path) -> None:
    """The loss of a picture, the encoder by itself, and training that goes on."""
    model = mae(mask_ratio=0.6, norm_pix_loss=False)
    done = export(prepare(model, FORM), FORM, ORIGIN, tmp_path / "out")
    assert 0 < done.difference <= TOLERANCE
    assert {path.name for path in done.path.iterdir()} == {
        "README.md",
        "config.json",
        "fastjepa_export.json",
        "model.safetensors",
        "preprocessor_config.json",
    }
    # Blocks as transformers 4 names them, which 5 reads too.
    names = load_file(done.path / "model.safetensors").keys()
    for stack in ("vit.encoder.layer", "decoder.decoder_layers"):
        assert f"{stack}.1.attention.attention.query.weight" in names
    here = str(Path(__file__).resolve().parents[2]).encode()
    assert not any(here in path.read_bytes() for path in done.path.iterdir()), "it tells of the machine"

    given_alone(model, picture(model.encoder.shape, tmp_path / "image.png"), tmp_path / "given.safetensors")
    run_alone(ALONE, tmp_path)


@pytest.mark.slow
def test_a_run_is_exported_with_what_it_was_trained_for(
    trainer_at: "Callable[[Path], Trainer]", tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Grey clothes, and a ratio and a loss that are no default."""
    trainer = trainer_at(tmp_path)
    command = [sys.executable, "-m", "fastjepa.cli", "train", "--config", str(trainer.write_config())]
    settings = "objective.name=mae objective.norm_pix_loss=false masks.mask_ratio=0.6 optim.steps=5"
    decoder = "model.decoder_width=16 model.decoder_depth=1 model.decoder_heads=2"
    done = subprocess.run(
        [*command, *settings.split(), *decoder.split()],
        env=trainer.environment,
        capture_output=True,
        text=True,
        timeout=150,
    )
    assert done.returncode == 0, done.stderr
    command = ["export", str(trainer.run), str(tmp_path / "out"), "--format", FORM.name]
    assert main(command) == 0
    assert "transformers" in capsys.readouterr().out
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    told = [config[key] for key in ("mask_ratio", "norm_pix_loss", "decoder_hidden_size", "num_channels")]
    assert told == [0.6, False, 16, 1]

    model, _ = load_trained(trainer.run)
    assert isinstance(model, MAE)
    pixels = FashionMNIST(None, "test").images[:1]  # [1, 1, 28, 28]
    Image.fromarray(pixels[0, 0].numpy()).save(tmp_path / "image.png")
    given_alone(model, pixels, tmp_path / "given.safetensors")
    run_alone(ALONE, tmp_path)
    assert main([*command, "--encoder", "context", "--force"]) == 1
    assert "leave out --encoder" in capsys.readouterr().err


def test_the_card_says_what_paints_and_how_it_is_judged(tmp_path: Path) -> None:
    done = export(prepare(mae(norm_pix_loss=False), FORM), FORM, ORIGIN, tmp_path / "out")
    text = done.card.read_text()
    for line in (
        "library_name: transformers",
        "| Method | MAE |",
        "| Decoder | 2 blocks of width 16, 2 heads |",
        "| Loss | mean squared error of hidden normalised pixels; 75% of the patches are hidden |",
    ):
        assert f"{line}\n" in text
    assert "pipeline_tag" not in text


@pytest.mark.parametrize("name", ["decoder_pos_embed", "mask_token", "decoder_blocks.1.attn.qkv.bias"])
def test_a_decoder_that_is_another_is_seen(name: str, tmp_path: Path) -> None:
    other = mae()
    assert other.decoder is not None
    with torch.no_grad():
        other.decoder.state_dict()[name].flatten()[-1].add_(0.05)
    writes = replace(FORM, write=lambda _given, path: FORM.write(prepare(other, FORM), path))
    with pytest.raises(ExportError, match="reads what was written otherwise"):
        export(prepare(mae(), FORM), writes, ORIGIN, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_diverged_decoder_is_refused(tmp_path: Path) -> None:
    model = mae()
    assert model.decoder is not None
    with torch.no_grad():
        model.decoder.decoder_pred.bias[3] = torch.nan
    with pytest.raises(ExportError, match="what the model gives is not finite"):
        export(prepare(model, FORM), FORM, ORIGIN, tmp_path / "out")


def test_what_it_cannot_hold() -> None:
    with pytest.raises(ExportError, match=r"this is an I-JEPA, .* take format transformers"):
        prepare(jepa(), FORM)
    with pytest.raises(ExportError, match=r"square images alone, got 16 x 24 pixels: take format official"):
        prepare(mae(image_size=(16, 24)), FORM)
    with pytest.raises(ExportError, match="leave out --encoder and --image-size"):
        prepare(mae(), FORM, image_size=(32, 32))
    with pytest.raises(ValueError, match="this is an I-JEPA"):
        to_vit_mae(jepa())
    with pytest.raises(ExportError, match=r"an encoder alone, .* take a full pretraining checkpoint"):
        prepare(MAE(mae().encoder, None), FORM)
