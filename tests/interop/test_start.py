"""Starting from weights that are there already."""

import json
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from torch import Tensor

from fastjepa.config import Config, ConfigError, load_config
from fastjepa.engine.build import build_model
from fastjepa.engine.checkpoints.checkpoint import CheckpointError, Position, load_checkpoint, state_of
from fastjepa.engine.checkpoints.verify import newest_good
from fastjepa.engine.checkpoints.write import write_checkpoint
from fastjepa.interop import load_initial_weights, save_official
from fastjepa.interop.start import find_checkpoint, load_trained
from fastjepa.objectives import JEPA, MAE

if TYPE_CHECKING:
    from tests.conftest import Trainer

MAE_SETTINGS = [
    "objective.name=mae",
    "model.decoder_width=16",
    "model.decoder_heads=2",
    "model.decoder_depth=1",
]


@pytest.fixture
def config(train: "Trainer") -> Config:
    return load_config(train.write_config())


def other_weights(config: Config) -> JEPA | MAE:
    """A model of that architecture, no two of its networks alike, and with no weight left at 0 or 1."""
    model = build_model(config)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return model


def write(model: JEPA | MAE, config: Config, run: Path, step: int = 3) -> Path:
    """A checkpoint of these weights in a run folder."""
    student = {name: tensor.detach() for name, tensor in model.trainable().named_parameters()}
    tensors: dict[str, dict[str, Tensor]] = {"student": student, "exp_avg": student, "exp_avg_sq": student}
    if isinstance(model, JEPA):
        target = model.target_encoder.named_parameters()
        tensors["target"] = {f"encoder.{name}": tensor.detach() for name, tensor in target}
    position = Position(step, 16 * step, 0.0, 280, 16)
    return write_checkpoint(run / "checkpoints", step, state_of(position, config.to_dict(), {}), tensors)


def assert_same(model: torch.nn.Module, expected: torch.nn.Module) -> None:
    found, wanted = model.state_dict(), expected.state_dict()
    assert found.keys() == wanted.keys()
    assert [name for name in found if not torch.equal(found[name], wanted[name])] == []


@pytest.mark.parametrize("settings", [[], MAE_SETTINGS], ids=["jepa", "mae"])
@pytest.mark.parametrize("kind", ["run folder", "checkpoint", "published file"])
def test_every_weight_comes_from_the_source(train: "Trainer", settings: list[str], kind: str) -> None:
    config = load_config(train.write_config(), settings)
    there = other_weights(config)
    if kind == "published file":
        source = train.home / "weights.pth.tar"
        save_official(there, source)
    else:
        checkpoint = write(there, config, train.run)
        source = train.run if kind == "run folder" else checkpoint
        assert_same(load_trained(source)[0], there)
    model = build_model(config)
    load_initial_weights(model, str(source))
    assert_same(model, there)


def test_newest_good_checkpoint_of_a_run_is_taken(
    train: "Trainer", config: Config, caplog: pytest.LogCaptureFixture
) -> None:
    model = other_weights(config)
    write(model, config, train.run, step=3)
    damaged = write(build_model(config), config, train.run, step=9)
    (damaged / "student.safetensors").unlink()
    loaded, path = load_trained(train.run)
    assert path.name == "step_00000003"
    assert "student.safetensors" in caplog.text
    assert "taking step_00000003 instead" in caplog.text
    assert_same(loaded, model)
    with pytest.raises(CheckpointError, match=r"student\.safetensors"):
        find_checkpoint(damaged)


def test_another_size_of_image_is_no_other_architecture(train: "Trainer", config: Config) -> None:
    """Position tables are computed, so a run may go on at another resolution."""
    there = other_weights(config)
    source = write(there, config, train.run)
    larger = build_model(load_config(train.write_config(), ["data.image_size=56"]))
    load_initial_weights(larger, str(source))
    assert torch.equal(larger.encoder.patch_embed.proj.weight, there.encoder.patch_embed.proj.weight)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (["model.width=64"], "encoder do not fit: blocks.0.attn.proj.bias is [32] and should be [64]"),
        (["model.depth=2"], "blocks.1.attn.proj.bias is missing"),
        (["model.predictor_depth=2"], "the tensors of predictor do not fit: predictor_blocks.1"),
        (MAE_SETTINGS, "it has no decoder: was it trained with another objective?"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("kind", ["checkpoint", "published file"])
def test_another_architecture_is_named(
    train: "Trainer", config: Config, settings: list[str], said: str, kind: str
) -> None:
    if kind == "checkpoint":
        source = write(other_weights(config), config, train.run)
    else:
        source = train.home / "weights.pth.tar"
        save_official(other_weights(config), source)
    model = build_model(load_config(train.write_config(), settings))
    with pytest.raises(ConfigError) as caught:
        load_initial_weights(model, str(source))
    assert f"run.init_from {source}: " in str(caught.value)
    assert said in str(caught.value)


def test_what_is_no_source_of_weights(train: "Trainer", config: Config) -> None:
    model = build_model(config)
    empty = train.home / "empty"
    empty.mkdir()
    text = train.home / "notes.txt"
    text.write_text("hello")
    for source, said in (
        (train.home / "nowhere", "cannot read"),
        (empty, "is no checkpoint, and no run folder with one"),
        (text, "notes.txt"),
    ):
        with pytest.raises(ConfigError, match=f"run.init_from {source}: .*{said}"):
            load_initial_weights(model, str(source))


def test_optimizer_and_schedules_start_afresh(train: "Trainer", config: Config) -> None:
    there = other_weights(config)
    assert isinstance(there, JEPA)
    source = write(there, config, train.home / "elsewhere", step=900)
    standing_still = ("optim.lr=0", "optim.start_lr=0", "optim.final_lr=0", "optim.momentum=1")
    train(
        f"run.init_from={source}",
        "optim.steps=1",
        *standing_still,
        "optim.warmup_epochs=0",
        "probe.at_ends=true",
    ).check()

    found, _ = newest_good(train.run / "checkpoints")
    assert found is not None
    checkpoint = load_checkpoint(found)
    assert checkpoint.position.step == 1
    expected = there.state_dict()
    for name, tensor in checkpoint.tensors["student"].items():
        assert torch.equal(tensor, expected[name])
    for name, tensor in checkpoint.tensors["target"].items():
        assert torch.equal(tensor, expected[f"target_{name}"])
    # Moments of a first step: (1 - .9) g and (1 - .999) g^2.
    for name, first in checkpoint.tensors["exp_avg"].items():
        torch.testing.assert_close(
            checkpoint.tensors["exp_avg_sq"][name], 0.1 * first**2, rtol=1e-4, atol=1e-30
        )
    [row] = train.rows
    assert row["step"] == 1
    probed = json.loads((train.run / "report" / "summary.json").read_text())["probe"]
    assert [row["name"] for row in probed][:3] == ["raw pixels", "untrained encoder", "initial weights"]
    assert probed[2]["knn_top1"] == probed[3]["knn_top1"], "it stood still"
