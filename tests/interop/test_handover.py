"""Encoders in other tools, run there without fastjepa, beside our own."""

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from fastjepa.interop import load_encoder, save_encoder, to_timm, to_transformers
from fastjepa.interop.graphs import save_onnx, save_program
from fastjepa.interop.huggingface import save_transformers
from fastjepa.interop.portable import PortableEncoder, at_image_size, choose_encoder
from fastjepa.interop.timm_vit import ratio_for, recipe_of, save_timm
from fastjepa.models import VisionTransformer
from fastjepa.models.positions import sincos_2d
from fastjepa.objectives import JEPA, MAE
from tests.interop.handing_over import CLASSES, WIDTH, head, images, jepa, mae, run_alone

LIMIT = 1e-5


@pytest.fixture(scope="module", params=["jepa", "jepa, one channel", "mae"])
def model(request: pytest.FixtureRequest) -> JEPA | MAE:
    if request.param == "mae":
        return mae()
    return jepa(channels=1 if "one" in request.param else 3)


def normalised(encoder: VisionTransformer, pixels: torch.Tensor) -> torch.Tensor:
    mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (encoder.pixel_mean, encoder.pixel_std))
    return (pixels / 255 - mean) / std


@pytest.mark.parametrize("image_size", [None, (24, 12)])
@pytest.mark.parametrize("which", ["target", "context"])
@torch.no_grad()
def test_models_made_in_memory_say_the_same(
    model: JEPA | MAE, which: str, image_size: tuple[int, int] | None
) -> None:
    chosen = choose_encoder(model, "context" if isinstance(model, MAE) else which)
    encoder = at_image_size(chosen, image_size or chosen.shape.image_size)
    pixels = images(encoder.shape)
    tokens = encoder(pixels)  # [B, N, D]
    features = tokens[:, int(encoder.shape.class_token) :].mean(dim=1)
    assert tokens.std() > 0.3, "features that are all alike would fit anything"

    theirs = to_transformers(model, which, image_size)(normalised(encoder, pixels)).last_hidden_state
    assert (theirs - tokens).abs().max() < LIMIT
    timm_model = to_timm(model, which, image_size)
    assert (timm_model.forward_features(normalised(encoder, pixels)) - tokens).abs().max() < LIMIT
    assert (timm_model(normalised(encoder, pixels)) - features).abs().max() < LIMIT
    ported, pooled = PortableEncoder(encoder).eval()(pixels)
    assert (ported - tokens).abs().max() < LIMIT
    assert (pooled - features).abs().max() < LIMIT


@torch.no_grad()
def test_a_model_made_in_memory_has_weights_of_its_own() -> None:
    model = jepa()
    before = model.target_encoder.state_dict()["norm.weight"].clone()
    for other in (to_transformers(model), to_timm(model)):
        for parameter in other.parameters():
            parameter.fill_(9)
    assert torch.equal(model.target_encoder.norm.weight, before)


@torch.no_grad()
def test_another_image_size_has_the_positions_in_between() -> None:
    """The exported model is the encoder itself, given the positions of the new grid in the trained one."""
    trained = jepa().target_encoder
    resized = at_image_size(trained, (8, 24))
    grid, table = (2, 6), resized.pos_embed[0].unflatten(0, (2, 6))
    # Two rows of patches on four: centres at 0.5 and 2.5. Six columns on four: -1/6, 1/2, 7/6 and so on.
    down, across = (0.5, 2.5), [(place + 0.5) * 4 / 6 - 0.5 for place in range(6)]
    frequencies = 10000.0 ** (-torch.arange(WIDTH // 4, dtype=torch.float64) / (WIDTH // 4))
    for row in range(grid[0]):
        for column in range(grid[1]):
            angles = [place * frequencies for place in (across[column], down[row])]
            expected = torch.cat([part for angle in angles for part in (angle.sin(), angle.cos())])
            torch.testing.assert_close(table[row, column].double(), expected, rtol=0, atol=1e-7)
    own = dict(trained.named_parameters())
    assert all(torch.equal(own[name], parameter) for name, parameter in resized.named_parameters())
    assert torch.equal(at_image_size(trained, trained.shape.image_size).pos_embed, trained.pos_embed)


def test_positions_of_another_kind_are_not_resized() -> None:
    encoder = jepa().target_encoder
    encoder.pos_embed += 0.01
    assert torch.equal(at_image_size(encoder, (16, 16)).pos_embed, encoder.pos_embed)
    with pytest.raises(ValueError, match=r"only those can be computed .* leave it at 16 x 16"):
        at_image_size(encoder, (32, 32))
    with pytest.raises(ValueError, match=r"18 x 16 pixels .* nearest sizes that fit are 16 x 16"):
        at_image_size(jepa().encoder, (18, 16))


def test_encoders_that_are_not_there() -> None:
    with pytest.raises(ValueError, match="one of target, context, got 'teacher'"):
        choose_encoder(jepa(), "teacher")
    with pytest.raises(ValueError, match="an MAE has one encoder, and no target encoder"):
        choose_encoder(mae(), "target")


@given(st.integers(1, 4096), st.integers(1, 20_000))
def test_timm_makes_as_many_hidden_units(width: int, hidden: int) -> None:
    assert int(width * ratio_for(width, hidden)) == hidden


@pytest.mark.parametrize("classes", [0, CLASSES])
def test_the_printed_recipe_is_the_model(classes: int) -> None:
    timm = pytest.importorskip("timm")
    encoder = mae().encoder
    made = eval(recipe_of(encoder, classes).call(), {"timm": timm})
    theirs = {name: list(tensor.shape) for name, tensor in made.state_dict().items() if name[:4] != "head"}
    assert theirs == {name: list(tensor.shape) for name, tensor in encoder.state_dict().items()}
    assert made.num_classes == classes
    assert made.norm.eps == encoder.norm.eps


ALONE = """
import json
import torch
from safetensors.torch import load_file

given = load_file("given.safetensors")

def check(name, found):
    worst = (given[name] - torch.as_tensor(found)).abs().max().item()
    assert given[name].shape == found.shape, (name, found.shape)
    assert worst < 1e-5, (name, worst)
"""
TRANSFORMERS_ALONE = """
from transformers import AutoImageProcessor, AutoModel, AutoModelForImageClassification

processor = AutoImageProcessor.from_pretrained("out")
pixels = processor(list(given["images"]), return_tensors="pt")["pixel_values"]
check("pixels", pixels)
with torch.no_grad():
    check("tokens", AutoModel.from_pretrained("out").eval()(pixels).last_hidden_state)
    classifier = AutoModelForImageClassification.from_pretrained("out").eval()
    logits = classifier(pixels).logits
check("logits", logits)
assert torch.equal(logits.argmax(dim=1), given["logits"].argmax(dim=1))
labels = [classifier.config.id2label[number] for number in logits.argmax(dim=1).tolist()]
assert labels == json.load(open("labels.json")), labels
"""
TIMM_ALONE = """
import timm

model = timm.create_model("local-dir:out", pretrained=True).eval()
with torch.no_grad():
    check("tokens", model.forward_features(given["pixels"]))
    check("logits", model(given["pixels"]))
config = timm.data.resolve_model_data_config(model)
assert config["input_size"] == (3, 24, 16) and abs(config["mean"][1] - .5) < 1e-9, config
assert json.load(open("out/config.json"))["label_names"] == ["bag", "boot", "coat", "dress", "shirt"]
"""
ONNX_ALONE = """
import onnxruntime

session = onnxruntime.InferenceSession("out")
for batch in (1, 3, 5):
    found = session.run(None, {"images": given["images"][:batch].numpy()})
    whole, given = given, {name: tensor[:batch] for name, tensor in given.items()}
    for name, array in zip(("tokens", "features", "logits"), found, strict=True):
        check(name, array)
    given = whole
names = session.get_modelmeta().custom_metadata_map["class_names"]
assert json.loads(names) == ["bag", "boot", "coat", "dress", "shirt"]
"""
TORCH_ALONE = """
named = {"class_names.json": ""}
model = torch.export.load("out.pt2", extra_files=named).module()
for batch in (1, 3, 5):
    whole, found = given, model(given["images"][:batch])
    given = {name: tensor[:batch] for name, tensor in whole.items()}
    for name, tensor in zip(("tokens", "features", "logits"), found, strict=True):
        check(name, tensor)
    given = whole
assert json.loads(named["class_names.json"]) == ["bag", "boot", "coat", "dress", "shirt"]
"""
WRITERS = {
    "transformers": (save_transformers, "out", TRANSFORMERS_ALONE),
    "timm": (save_timm, "out", TIMM_ALONE),
    "onnx": (save_onnx, "out", ONNX_ALONE),
    "torch": (save_program, "out.pt2", TORCH_ALONE),
}


@pytest.mark.parametrize("tool", WRITERS)
def test_a_tool_reads_it_where_fastjepa_is_not(tool: str, tmp_path: Path) -> None:
    """At another size of image too, with the classes that we would say."""
    encoder = at_image_size(jepa().target_encoder, (24, 16))
    pixels, classifier = images(encoder.shape, CLASSES), head(encoder)
    with torch.no_grad():
        tokens = encoder(pixels)
    features = tokens.mean(dim=1)
    given = {"images": pixels, "pixels": normalised(encoder, pixels), "tokens": tokens}
    logits = classifier.logits(features)
    save_file(given | {"features": features, "logits": logits}, tmp_path / "given.safetensors")
    labels = [classifier.names[number] for number in logits.argmax(dim=1).tolist()]
    assert labels == list(classifier.names)
    (tmp_path / "labels.json").write_text(json.dumps(labels))

    save, name, lines = WRITERS[tool]
    save(encoder, classifier, tmp_path / name)
    here, written = str(Path(__file__).resolve().parents[2]).encode(), tmp_path / name
    files = list(written.iterdir()) if written.is_dir() else [written]
    assert not any(here in file.read_bytes() for file in files), "it tells of the machine"
    run_alone(ALONE + lines, tmp_path)


def test_an_encoder_without_a_head_takes_a_fresh_one(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    encoder = at_image_size(jepa().target_encoder, (16, 16))
    save_transformers(encoder, None, tmp_path / "out")
    fresh = transformers.IJepaForImageClassification.from_pretrained(tmp_path / "out", num_labels=7).eval()
    pixels = images(encoder.shape)
    with torch.no_grad():
        outputs = fresh.ijepa(normalised(encoder, pixels)).last_hidden_state
        assert (outputs - encoder(pixels)).abs().max() < LIMIT
    assert fresh.classifier.weight.shape == (7, WIDTH)


def test_a_tensor_file_comes_back_bit_by_bit(model: JEPA | MAE, tmp_path: Path) -> None:
    encoder, path = model.encoder, tmp_path / "encoder.safetensors"
    save_encoder(encoder, path)
    found = load_encoder(path)
    assert found.shape == encoder.shape
    assert (found.pixel_mean, found.pixel_std) == (encoder.pixel_mean, encoder.pixel_std)
    assert found.state_dict().keys() == encoder.state_dict().keys()
    assert all(torch.equal(found.state_dict()[name], own) for name, own in encoder.state_dict().items())


def test_what_is_no_tensor_file_of_an_encoder(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(1)}, tmp_path / "other.safetensors")
    (tmp_path / "text.safetensors").write_text("hello")
    for name, said in (("other", "its format is None"), ("text", ""), ("none", "")):
        with pytest.raises(ValueError, match=rf"{name}\.safetensors is not read as an encoder: .*{said}"):
            load_encoder(tmp_path / f"{name}.safetensors")


def test_at_the_trained_size_the_table_is_the_published_one() -> None:
    encoder = at_image_size(jepa().target_encoder, (16, 16))
    assert torch.equal(encoder.pos_embed, sincos_2d((4, 4), WIDTH))
