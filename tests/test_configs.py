"""Every recipe in configs/: it loads, its schedule fits its length, and its model and masks can be made."""

from pathlib import Path

import pytest
import torch

from fastjepa.config import load_config
from fastjepa.data.order import GlobalOrder
from fastjepa.engine.build import (
    build_augmentation,
    build_masks,
    build_model,
    build_order,
    build_schedule,
)
from fastjepa.engine.images import open_images
from fastjepa.objectives import JEPA

CONFIGS = sorted((Path(__file__).resolve().parents[1] / "configs").glob("*.yaml"))
IMAGENET = 1_281_167  # images of ImageNet-1k


def test_there_are_recipes() -> None:
    assert CONFIGS


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_recipe_can_be_run(path: Path) -> None:
    """Models are made without memory for their weights, so the largest fit here too."""
    # The folder is the one thing that a recipe leaves to its user.
    asks_for_root = "name: folder" in path.read_text() and "root:" not in path.read_text()
    config = load_config(path, ["data.root=/images"] if asks_for_root else [])
    assert config.run.name == path.stem
    images = IMAGENET if config.data.name == "folder" else len(open_images(config).train)
    order: GlobalOrder = build_order(config, images)
    schedule = build_schedule(config, order.steps_per_epoch)
    assert schedule.steps > schedule.warmup_steps
    assert schedule.at(schedule.steps - 1).lr == pytest.approx(config.optim.final_lr)
    build_augmentation(config)

    with torch.device("meta"):
        model = build_model(config)
    masks = build_masks(config).sample(torch.arange(8))
    grid = model.encoder.shape.grid
    assert 0 < int(masks.context.max()) < grid[0] * grid[1]
    if isinstance(model, JEPA):
        assert len(masks.targets) == config.masks.target_blocks


def test_published_recipe_is_as_published() -> None:
    """arXiv:2301.08243, appendix A.1, and the released weights."""
    [path] = [path for path in CONFIGS if path.stem == "ijepa_vit_huge_14"]
    config = load_config(path, ["data.root=/images"])
    assert (config.optim.global_batch, config.optim.epochs, config.optim.warmup_epochs) == (2048, 300, 40)
    assert (config.optim.start_lr, config.optim.lr, config.optim.final_lr) == (2e-4, 1e-3, 1e-6)
    assert (config.optim.weight_decay, config.optim.final_weight_decay) == (0.04, 0.4)
    assert (config.optim.momentum, config.optim.final_momentum) == (0.996, 1.0)
    assert (config.optim.clip_grad, config.optim.betas, config.optim.eps) == (0.0, (0.9, 0.999), 1e-8)
    assert (config.masks.mode, config.masks.target_blocks, config.masks.min_keep) == ("truncate", 4, 10)
    assert (config.masks.target_scale, config.masks.target_aspect) == ((0.15, 0.2), (0.75, 1.5))
    assert (config.masks.context_scale, config.masks.context_aspect) == ((0.85, 1.0), (1.0, 1.0))
    assert (config.data.crop_scale, config.data.flip) == ((0.3, 1.0), 0.0)
    with torch.device("meta"):
        model = build_model(config)
    assert isinstance(model, JEPA)
    # Of the published ViT-H/14 with its predictor: positions are no parameters here.
    assert sum(p.numel() for p in model.encoder.parameters()) == pytest.approx(630.8e6, rel=1e-3)
    assert len(model.predictor.predictor_blocks) == 12
