"""Files in the published layouts, made here by hand from names and shapes alone, in and out of our models."""

import argparse
import copy
import resource
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fastjepa.interop import load_official, save_official
from fastjepa.models import Predictor, VisionTransformer, ViTShape
from fastjepa.models.block import Block
from fastjepa.models.positions import sincos_2d
from fastjepa.objectives import JEPA, MAE

State = dict[str, Tensor]
GRID, PATCH, WIDTH, PREDICTOR_WIDTH, DECODER_WIDTH = (3, 3), 4, 192, 96, 512


def block_tensors(prefix: str, depth: int, width: int) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {}
    for i in range(depth):
        for name, shape in {
            "norm1.weight": (width,),
            "norm1.bias": (width,),
            "attn.qkv.weight": (3 * width, width),
            "attn.qkv.bias": (3 * width,),
            "attn.proj.weight": (width, width),
            "attn.proj.bias": (width,),
            "norm2.weight": (width,),
            "norm2.bias": (width,),
            "mlp.fc1.weight": (4 * width, width),
            "mlp.fc1.bias": (4 * width,),
            "mlp.fc2.weight": (width, 4 * width),
            "mlp.fc2.bias": (width,),
        }.items():
            shapes[f"{prefix}.{i}.{name}"] = shape
    return shapes


def filled(shapes: dict[str, tuple[int, ...]], prefix: str = "") -> State:
    """Random weights, tables included: every bit must come from the file, none from our own computation."""
    return {prefix + name: torch.randn(shape) / 10 for name, shape in shapes.items()}


def encoder_tensors(grid: tuple[int, int], class_token: bool = False, width: int = WIDTH) -> dict[str, Any]:
    tokens = {"cls_token": (1, 1, width)} if class_token else {}
    return {
        **tokens,
        "pos_embed": (1, grid[0] * grid[1] + class_token, width),
        "patch_embed.proj.weight": (width, 3, PATCH, PATCH),
        "patch_embed.proj.bias": (width,),
        **block_tensors("blocks", 2, width),
        "norm.weight": (width,),
        "norm.bias": (width,),
    }


def predictor_tensors(grid: tuple[int, int], width: int = WIDTH) -> dict[str, Any]:
    return {
        "mask_token": (1, 1, PREDICTOR_WIDTH),
        "predictor_pos_embed": (1, grid[0] * grid[1], PREDICTOR_WIDTH),
        "predictor_embed.weight": (PREDICTOR_WIDTH, width),
        "predictor_embed.bias": (PREDICTOR_WIDTH,),
        **block_tensors("predictor_blocks", 1, PREDICTOR_WIDTH),
        "predictor_norm.weight": (PREDICTOR_WIDTH,),
        "predictor_norm.bias": (PREDICTOR_WIDTH,),
        "predictor_proj.weight": (width, PREDICTOR_WIDTH),
        "predictor_proj.bias": (width,),
    }


def decoder_tensors() -> dict[str, Any]:
    return {
        "mask_token": (1, 1, DECODER_WIDTH),
        "decoder_pos_embed": (1, GRID[0] * GRID[1] + 1, DECODER_WIDTH),
        "decoder_embed.weight": (DECODER_WIDTH, WIDTH),
        "decoder_embed.bias": (DECODER_WIDTH,),
        **block_tensors("decoder_blocks", 1, DECODER_WIDTH),
        "decoder_norm.weight": (DECODER_WIDTH,),
        "decoder_norm.bias": (DECODER_WIDTH,),
        "decoder_pred.weight": (PATCH * PATCH * 3, DECODER_WIDTH),
        "decoder_pred.bias": (PATCH * PATCH * 3,),
    }


def published_optimizer(encoder: State, predictor: State) -> torch.optim.AdamW:
    """AdamW as the published code builds it, where position tables are parameters without gradient."""
    networks = [
        {
            name: torch.nn.Parameter(tensor.clone(), requires_grad="pos_embed" not in name)
            for name, tensor in network.items()
        }
        for network in (encoder, predictor)
    ]

    def group(network: dict[str, Any], decayed: bool) -> list[Any]:
        return [p for name, p in network.items() if ("bias" not in name and p.ndim != 1) == decayed]

    groups: list[dict[str, Any]] = [{"params": group(network, True)} for network in networks]
    groups += [
        {"params": group(network, False), "WD_exclude": True, "weight_decay": 0} for network in networks
    ]
    return torch.optim.AdamW(groups)


def take_a_step(optimizer: torch.optim.AdamW) -> None:
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if parameter.requires_grad:
                parameter.grad = torch.randn_like(parameter)
    optimizer.step()


def published_jepa(grid: tuple[int, int] = GRID, width: int = WIDTH) -> dict[str, Any]:
    torch.manual_seed(0)
    encoder = filled(encoder_tensors(grid, width=width), "module.")
    predictor = filled(predictor_tensors(grid, width), "module.")
    optimizer = published_optimizer(encoder, predictor)
    take_a_step(optimizer)
    return {
        "encoder": encoder,
        "predictor": predictor,
        "target_encoder": filled(encoder_tensors(grid, width=width), "module."),
        "opt": optimizer.state_dict(),
        "scaler": {"scale": 32768.0, "growth_factor": 2.0, "backoff_factor": 0.5, "growth_interval": 2000},
        "epoch": 300,
        "loss": 0.231,
        "batch_size": 128,
        "world_size": 16,
        "lr": 1e-6,
    }


def published_mae(with_decoder: bool) -> dict[str, Any]:
    torch.manual_seed(0)
    shapes = encoder_tensors(GRID, class_token=True) | (decoder_tensors() if with_decoder else {})
    return {
        "model": filled(shapes),
        "epoch": 799,
        "args": argparse.Namespace(model="mae_vit_tiny", lr=1e-3, blr=None),
    }


def heads(blocks: torch.nn.ModuleList) -> int:
    block = blocks[0]
    assert isinstance(block, Block)
    return block.attn.heads


def saved(content: Any, path: Path) -> Path:
    torch.save(content, path)
    return path


def assert_same_bits(one: Any, other: Any, where: str = "") -> None:
    assert type(one) is type(other), where
    if isinstance(one, Tensor):
        assert one.dtype == other.dtype, where
        assert one.shape == other.shape, where
        assert one.numpy().tobytes() == other.numpy().tobytes(), where
    elif isinstance(one, dict):
        assert one.keys() == other.keys(), where
        for key in one:
            assert_same_bits(one[key], other[key], f"{where}.{key}")
    else:
        assert one == other, where


def test_an_i_jepa_file_comes_back_bit_by_bit(tmp_path: Path) -> None:
    content = published_jepa()
    content["encoder"]["module.norm.bias"][:3] = torch.tensor([-0.0, float("inf"), 1e-42])
    jepa = load_official(saved(content, tmp_path / "in.pth.tar"))
    assert isinstance(jepa, JEPA)
    save_official(jepa, tmp_path / "out.pth.tar")
    assert_same_bits(torch.load(tmp_path / "out.pth.tar", weights_only=True), content)


def test_the_architecture_is_read_off_the_tensors(tmp_path: Path) -> None:
    jepa = load_official(saved(published_jepa(), tmp_path / "in.pth.tar"))
    assert isinstance(jepa, JEPA)
    assert jepa.encoder.shape == ViTShape((12, 12), PATCH, WIDTH, depth=2, heads=3)
    assert heads(jepa.predictor.predictor_blocks) == 3
    index = torch.arange(4).expand(2, -1)
    assert jepa.loss(torch.randn(2, 3, 12, 12), index, 4 + index[None]).isfinite()
    chosen = load_official(tmp_path / "in.pth.tar", heads=6, predictor_heads=2)
    assert isinstance(chosen, JEPA)
    assert (heads(chosen.encoder.blocks), heads(chosen.predictor.predictor_blocks)) == (6, 2)


@pytest.mark.parametrize("with_decoder", [True, False])
def test_an_mae_file_comes_back_bit_by_bit(with_decoder: bool, tmp_path: Path) -> None:
    content = published_mae(with_decoder)
    mae = load_official(saved(content, tmp_path / "in.pth"))
    assert isinstance(mae, MAE)
    save_official(mae, tmp_path / "out.pth")
    found = torch.load(tmp_path / "out.pth", weights_only=True)
    assert found.keys() == {"model"}
    assert_same_bits(found["model"], content["model"])
    images = torch.randn(2, 3, 12, 12)
    if with_decoder:
        assert mae.decoder is not None
        assert heads(mae.decoder.decoder_blocks) == 16
        assert mae.loss(images).isfinite()
    else:
        assert mae.encoder(images).shape == (2, 10, WIDTH)
        with pytest.raises(ValueError, match="no decoder"):
            mae.loss(images)


def test_the_optimizer_of_a_file_is_carried_over(tmp_path: Path) -> None:
    content = published_jepa()
    save_official(load_official(saved(content, tmp_path / "in")), tmp_path / "out")
    found = torch.load(tmp_path / "out", weights_only=True)
    optimizer = published_optimizer(found["encoder"], found["predictor"])
    optimizer.load_state_dict(found["opt"])
    assert_same_bits(optimizer.state_dict()["state"], content["opt"]["state"])
    take_a_step(optimizer)


def test_a_model_of_ours_gets_an_optimizer_that_the_published_loader_takes(tmp_path: Path) -> None:
    shape = ViTShape((16, 8), PATCH, 64, depth=2, heads=1)
    jepa = JEPA(VisionTransformer(shape), Predictor(shape.grid, 64, 32, depth=3, heads=1))
    save_official(jepa, tmp_path / "out")
    found = torch.load(tmp_path / "out", weights_only=True)
    assert found.keys() == {*published_jepa(), "fastjepa_heads"}  # a width without published ones
    optimizer = published_optimizer(found["encoder"], found["predictor"])
    optimizer.load_state_dict(copy.deepcopy(found["opt"]))
    assert [group["weight_decay"] == 0 for group in optimizer.param_groups] == [False, False, True, True]
    assert [group.get("WD_exclude", False) for group in optimizer.param_groups] == [False, False, True, True]
    take_a_step(optimizer)
    torch.amp.GradScaler("cpu").load_state_dict(found["scaler"])
    again = load_official(tmp_path / "out", heads=1)
    for name, tensor in jepa.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor)


def test_a_file_without_an_optimizer_gets_a_fresh_one(tmp_path: Path) -> None:
    content = {name: published_jepa()[name] for name in ("encoder", "predictor", "target_encoder", "epoch")}
    save_official(load_official(saved(content, tmp_path / "in")), tmp_path / "out")
    found = torch.load(tmp_path / "out", weights_only=True)
    assert found["epoch"] == 300
    published_optimizer(found["encoder"], found["predictor"]).load_state_dict(found["opt"])


@pytest.mark.parametrize("grid", [(2, 6), (6, 2), (2, 8), (4, 4), (16, 1)])
def test_a_grid_that_is_not_square_is_read_off_the_positions(grid: tuple[int, int], tmp_path: Path) -> None:
    content = published_jepa(grid)
    for name in ("encoder", "target_encoder"):
        content[name]["module.pos_embed"] = sincos_2d(grid, WIDTH)
    jepa = load_official(saved(content, tmp_path / "in"))
    assert jepa.encoder.shape.grid == grid


def test_a_weight_that_is_a_view_of_a_flat_buffer_is_written_alone(tmp_path: Path) -> None:
    jepa = load_official(saved(published_jepa(), tmp_path / "in"))
    weight = jepa.encoder.norm.weight
    buffer = torch.zeros(10_000_000)
    buffer[: weight.numel()] = weight.detach()
    weight.data = buffer[: weight.numel()]
    save_official(jepa, tmp_path / "out")
    assert (tmp_path / "out").stat().st_size < (tmp_path / "in").stat().st_size + 1_000_000
    assert torch.equal(load_official(tmp_path / "out").encoder.norm.weight, weight)


def test_a_model_in_bf16_is_written_in_fp32(tmp_path: Path) -> None:
    jepa = load_official(saved(published_jepa(), tmp_path / "in")).bfloat16()
    save_official(jepa, tmp_path / "out")
    found = torch.load(tmp_path / "out", weights_only=True)["encoder"]
    for name, tensor in jepa.encoder.state_dict().items():
        assert_same_bits(found["module." + name], tensor.float(), name)


def test_a_failed_save_leaves_the_file_that_was_there(tmp_path: Path) -> None:
    path = saved(published_mae(with_decoder=False), tmp_path / "model.pth")
    mae, before = load_official(path), path.read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))  # as a disk that is full after 100 kB
    try:
        with pytest.raises((OSError, RuntimeError)):
            save_official(mae, path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert path.read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["model.pth"]
