"""Heads of attention in published files, whose tensors do not show them."""

from pathlib import Path

import pytest
import torch

from fastjepa.cli import main
from fastjepa.interop import load_encoder, load_official, save_official
from fastjepa.interop.official import heads_of
from fastjepa.models import Predictor, VisionTransformer, ViTShape
from fastjepa.objectives import JEPA, MAE
from tests.interop.handing_over import images, jepa, mae


@pytest.mark.parametrize("model", [jepa(), mae()], ids=["jepa", "mae"])
def test_a_file_of_ours_is_exported_again(
    model: JEPA | MAE, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Width 48 has no published heads: the file tells them."""
    ours, again = tmp_path / "ours.pth", tmp_path / "again.safetensors"
    save_official(model, ours)
    assert heads_of(load_official(ours)) == heads_of(model)
    assert main(["export", str(ours), str(again)]) == 0
    assert "Heads: 3, as the file or its width says" in capsys.readouterr().out
    judged = model.target_encoder if isinstance(model, JEPA) else model.encoder
    with torch.no_grad():
        # What normalises the pixels is not in the file.
        found = load_encoder(again)
        found.pixel_mean, found.pixel_std = judged.pixel_mean, judged.pixel_std
        assert torch.equal(found(images(judged.shape)), judged(images(judged.shape)))


def test_heads_of_a_file_of_others(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(0)
    shape = ViTShape((16, 16), 8, 192, depth=1, heads=6)
    model = JEPA(VisionTransformer(shape), Predictor(shape.grid, 192, 96, 1, 4))
    ours, theirs = tmp_path / "ours.pth.tar", tmp_path / "theirs.pth.tar"
    save_official(model, ours)
    content = torch.load(ours, weights_only=True)
    assert content.pop("fastjepa_heads") == {"heads": 6, "predictor_heads": 4}
    torch.save(content, theirs)
    assert main(["export", str(theirs), str(tmp_path / "taken.safetensors")]) == 0
    assert "Heads: 3, as the file or its width says; if it has others, --heads N" in capsys.readouterr().out
    assert "3 heads, as published for its width" in (tmp_path / "taken.safetensors.md").read_text()
    assert main(["export", str(theirs), str(tmp_path / "told.pth"), "--heads", "6,4"]) == 0
    assert heads_of(load_official(tmp_path / "told.pth")) == {"heads": 6, "predictor_heads": 4}
    for wrong in ("0", "6,", "a", "6,4,2"):
        with pytest.raises(SystemExit):
            main(["export", str(theirs), str(tmp_path / "a.pth"), "--heads", wrong])
    content["fastjepa_heads"] = {"heads": "6"}
    torch.save(content, theirs)
    assert main(["export", str(theirs), str(tmp_path / "a.pth")]) == 1
    assert "its fastjepa_heads are no numbers of heads" in capsys.readouterr().err
