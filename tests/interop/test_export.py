"""Whole exports: their cards, what is refused, and that nothing is lost or left behind."""

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError

from fastjepa.commands import export as command
from fastjepa.interop.export import TOLERANCE, Exported, export, largest_difference, prepare
from fastjepa.interop.formats import FORMATS, NAMES, Format, choose_format
from fastjepa.interop.provenance import Provenance
from fastjepa.interop.staging import MARKER, ExportError, check_place
from fastjepa.objectives import JEPA, MAE
from tests.interop.handing_over import head, jepa, mae, picture, run_alone

OUT = {form.name: f"out{form.suffixes[0] if form.suffixes else ''}" for form in FORMATS}
BY_NAME = {form.name: form for form in FORMATS}
OF_MAE = ("official", "transformers", "transformers-mae", "timm")
ORIGIN = Provenance("weights.pth.tar")


def made(model: JEPA | MAE, form: Format, out: Path, force: bool = False) -> Exported:
    return export(prepare(model, form), form, ORIGIN, out, force)


def everything_in(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    ("make", "form"),
    [(jepa, BY_NAME[name]) for name in NAMES if name != "transformers-mae"]
    + [(mae, BY_NAME[name]) for name in OF_MAE],
    ids=[name for name in NAMES if name != "transformers-mae"] + [f"{name}, mae" for name in OF_MAE],
)
def test_the_lines_of_the_card_load_it(form: Format, make: Callable[[], JEPA | MAE], tmp_path: Path) -> None:
    """As they stand, in a process of its own, and with a classifier where the format has room for one."""
    model = make()
    with_head = form.takes_head and not (form.name == "transformers" and isinstance(model, MAE))
    encoder = prepare(model, form).encoder
    given = prepare(model, form, head=head(encoder) if with_head else None)
    done = export(given, form, ORIGIN, tmp_path / OUT[form.name])
    assert done.difference <= TOLERANCE

    pixels = picture(encoder.shape, tmp_path / "image.png")
    with torch.no_grad():
        features = encoder(pixels)[:, int(encoder.shape.class_token) :].mean(dim=1)  # [1, D]
    expected = {"features": features.tolist()}
    if given.head is not None:
        expected["logits"] = given.head.logits(features).tolist()
    [block] = re.findall(r"```python\n(.*?)```", done.card.read_text(), re.DOTALL)
    check = f"""
import torch
for name, values in {expected!r}.items():
    worst = (torch.as_tensor(globals()[name]) - torch.tensor(values)).abs().max().item()
    assert worst < 1e-4, (name, worst)
"""
    ours = form.name in ("official", "safetensors")
    run_alone(block + check, tmp_path, blocked=not ours)


def test_a_card_says_what_it_is(tmp_path: Path) -> None:
    form = BY_NAME["safetensors"]
    given = prepare(jepa(), form, "context", (8, 24))
    text = export(given, form, ORIGIN, tmp_path / "out.safetensors").card.read_text()
    for said in (
        "license: # yours to say\n",
        "| Method | I-JEPA, context encoder |",
        "| Images | 8 x 24 pixels, 3 channel(s), trained on 16 x 16",
        "mean [0.4, 0.5, 0.6], std [0.2, 0.3, 0.25]",
        "| Source | weights.pth.tar |",
        "The run was not judged at this step.",
    ):
        assert said in text
    assert str(tmp_path) not in text


@pytest.mark.parametrize("name", ["safetensors", "timm"])
def test_nothing_is_replaced_unasked(name: str, tmp_path: Path) -> None:
    form, out = BY_NAME[name], tmp_path / OUT[name]
    made(jepa(), form, out)
    before = everything_in(tmp_path)
    with pytest.raises(ExportError, match=f"{out} exists; give another name, or --force"):
        made(jepa(), form, out)
    assert everything_in(tmp_path) == before
    other = jepa()
    with torch.no_grad():
        other.target_encoder.norm.weight.mul_(2)
    made(other, form, out, force=True)
    after = everything_in(tmp_path)
    assert after.keys() == before.keys()
    assert after != before


@pytest.mark.parametrize("beside", ["out.onnx.md", "out.onnx.data"])
def test_what_goes_beside_a_file_replaces_nothing_either(tmp_path: Path, beside: str) -> None:
    (tmp_path / beside).write_text("mine")
    with pytest.raises(ExportError, match=f"{beside} exists"):
        check_place(tmp_path / "out.onnx", is_folder=False, force=False)


def test_weights_beside_an_onnx_file_go_with_it(tmp_path: Path) -> None:
    """And only those of the file that is replaced."""
    onnx = pytest.importorskip("onnx")
    form, out = BY_NAME["onnx"], tmp_path / "out.onnx"
    made(jepa(), form, out)
    beside = tmp_path / "out.onnx.data"
    beside.write_text("somebody's")
    made(jepa(), form, out, force=True)
    assert beside.read_text() == "somebody's"
    parted = {"save_as_external_data": True, "location": beside.name, "size_threshold": 0}
    beside.unlink()
    onnx.save(onnx.load(out), out, **parted)
    assert beside.exists()
    made(jepa(), form, out, force=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.onnx", "out.onnx.md"]


def test_a_folder_of_somebody_is_never_replaced(tmp_path: Path) -> None:
    form, out = BY_NAME["timm"], tmp_path / "out"
    out.mkdir()
    made(jepa(), form, out, force=True)  # an empty one holds nothing to lose
    (out / "notes.txt").write_text("mine")
    with pytest.raises(ExportError, match=r"holds notes\.txt besides an earlier export"):
        made(jepa(), form, out, force=True)
    (out / MARKER).unlink()
    with pytest.raises(ExportError, match="is no earlier export, so it is not replaced"):
        made(jepa(), form, out, force=True)
    assert (out / "notes.txt").read_text() == "mine"
    (tmp_path / "link").symlink_to(out)
    with pytest.raises(ExportError, match="it is no folder"):
        check_place(tmp_path / "link", is_folder=True, force=True)


@pytest.mark.parametrize("form", FORMATS, ids=NAMES)
def test_a_failed_comparison_leaves_nothing_behind(form: Format, tmp_path: Path) -> None:
    """What is written is another model's, as if names had been mixed up."""
    model, other = (mae(), mae()) if form.name == "transformers-mae" else (jepa(), jepa())
    encoder = other.encoder if isinstance(other, MAE) else other.target_encoder
    with torch.no_grad():
        encoder.blocks.blocks()[1].norm2.bias.add_(0.01)
    writes = replace(form, write=lambda _given, path: form.write(prepare(other, form), path))
    given = prepare(model, form)
    with pytest.raises(ExportError, match=r"does not hold what was trained|reads what was written otherwise"):
        export(given, writes, ORIGIN, tmp_path / OUT[form.name])
    assert list(tmp_path.iterdir()) == []


def test_a_diverged_encoder_is_refused(tmp_path: Path) -> None:
    model = jepa()
    with torch.no_grad():
        model.target_encoder.norm.bias[3] = torch.nan
    with pytest.raises(ExportError, match="not finite"):
        made(model, BY_NAME["safetensors"], tmp_path / "out.safetensors")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("raised", "seen"),
    [
        (RuntimeError("No space left on device"), OSError),  # as torch says it
        (SafetensorError("No space left on device"), OSError),
        (KeyboardInterrupt("pressed"), KeyboardInterrupt),
    ],
)
def test_a_full_disk_or_an_interrupt_leaves_nothing_behind(
    raised: BaseException, seen: type[BaseException], tmp_path: Path
) -> None:
    form = BY_NAME["torch"]

    def full(_given: object, path: Path) -> None:
        path.write_bytes(b"half")
        raise raised

    with pytest.raises(seen, match=str(raised)):
        export(prepare(jepa(), form), replace(form, write=full), ORIGIN, tmp_path / "out.pt2")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "raised",
    [
        MemoryError(),
        RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory"),
        ValueError("[ONNXRuntimeError] : 6 : Failed to allocate memory for requested buffer of size 1"),
    ],
)
def test_too_little_memory_to_check_it(raised: Exception, tmp_path: Path) -> None:
    form = BY_NAME["safetensors"]

    def small(*_given: object) -> tuple[torch.Tensor, None]:
        raise raised

    with pytest.raises(ExportError, match="too little memory here to check it on 4 images of 16 x 16"):
        export(prepare(jepa(), form), replace(form, run=small), ORIGIN, tmp_path / "out.safetensors")
    assert list(tmp_path.iterdir()) == []


def test_a_difference_is_seen_wherever_it_is() -> None:
    tokens, logits = torch.full((2, 3, 4), 5.0), torch.ones(2, 7)
    assert largest_difference((tokens, logits), (tokens.clone(), logits.clone())) == 0
    other = tokens.clone()
    other[1, 2, 3] = 5.5
    assert largest_difference((tokens, None), (other, None)) == pytest.approx(0.1)
    assert largest_difference((tokens, logits), (tokens, logits * 1.25)) == pytest.approx(0.25)
    other[0, 0, 0] = torch.nan
    assert not largest_difference((tokens, logits), (other, logits)) <= TOLERANCE
    with pytest.raises(ExportError, match=r"gives \[2, 3\], and should give \[2, 3, 4\]"):
        largest_difference((tokens, None), (tokens[..., 0], None))
    with pytest.raises(ExportError, match="gives None, and should give"):
        largest_difference((tokens, logits), (tokens, None))


@pytest.mark.parametrize(
    ("name", "out", "said"),
    [
        (None, "a.pth.tar", "official"),
        (None, "a.pth", "official"),
        (None, "a.b.safetensors", "safetensors"),
        (None, "a.onnx", "onnx"),
        (None, "a.pt2", "torch"),
        ("timm", "a.b", "timm"),
        (None, "a", "a does not say its format; give --format: official (.pth.tar), transformers (a folder)"),
        ("onnx", "a.pt2", "a file of format onnx is called NAME.onnx, got a.pt2"),
        ("timm", "a.onnx", "format timm is a folder, and a.onnx is the name of a file of onnx"),
    ],
)
def test_the_format_is_that_of_the_name(name: str | None, out: str, said: str) -> None:
    if said in NAMES:
        assert choose_format(name, Path(out)).name == said
    else:
        with pytest.raises(ExportError, match=re.escape(said)):
            choose_format(name, Path(out))


def test_the_command_knows_every_format() -> None:
    assert command.FORMATS == NAMES


def test_what_a_format_cannot_hold() -> None:
    with pytest.raises(ExportError, match="holds all networks at their trained size: leave out --encoder"):
        prepare(jepa(), BY_NAME["official"], "target")
    with pytest.raises(ExportError, match="safetensors holds no classifier"):
        prepare(jepa(), BY_NAME["safetensors"], head=head(jepa().encoder))
    with pytest.raises(ExportError, match="only on its class token: leave --head out, or take timm"):
        prepare(mae(), BY_NAME["transformers"], head=head(mae().encoder))
    with pytest.raises(ExportError, match="an MAE has one encoder, and no target encoder"):
        prepare(mae(), BY_NAME["timm"], "target")
    with pytest.raises(ExportError, match="nearest sizes that fit are 16 x 20"):
        prepare(jepa(), BY_NAME["timm"], image_size=(17, 20))
    with pytest.raises(ExportError, match=r"100000 x 100000 have 625,000,000 patches .* take smaller images"):
        prepare(jepa(), BY_NAME["timm"], image_size=(100_000, 100_000))
    two = jepa(channels=2)
    with pytest.raises(ExportError, match=r"takes 2 channels.* take format safetensors"):
        prepare(two, BY_NAME["onnx"])


def test_a_folder_says_what_it_is(tmp_path: Path) -> None:
    made(jepa(), BY_NAME["transformers"], tmp_path / "out")
    says = json.loads((tmp_path / "out" / MARKER).read_text())
    assert (says["format"], says["encoder"], says["source"]) == ("transformers", "target", "weights.pth.tar")
    assert sorted(says["files"]) == sorted(everything_in(tmp_path / "out"))
    modes = {path.stat().st_mode & 0o777 for path in (tmp_path / "out").iterdir()}
    assert len(modes) == 1, "others may read the weights as they may read the card"
    shutil.copytree(tmp_path / "out", tmp_path / "copy")
    made(jepa(), BY_NAME["timm"], tmp_path / "copy", force=True)  # and a copy of an export is one too
    assert json.loads((tmp_path / "copy" / MARKER).read_text())["format"] == "timm"
