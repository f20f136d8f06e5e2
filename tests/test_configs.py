"""Every recipe in configs/: it loads, its schedule fits its length, and its model and masks can be made."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fastjepa.config import Config, differences, load_config
from fastjepa.data.order import GlobalOrder
from fastjepa.engine.build import (
    build_augmentation,
    build_heads,
    build_masks,
    build_model,
    build_order,
    build_schedule,
    build_shape,
)
from fastjepa.engine.images import open_images
from fastjepa.engine.launch import is_alone, micro_batch
from fastjepa.engine.speed import check_stage
from fastjepa.objectives import JEPA
from fastjepa.planning.plan import Device, make_plan

FOLDER = Path(__file__).resolve().parents[1] / "configs"
CONFIGS = sorted(FOLDER.glob("*.yaml"))
VARIANTS = [*sorted(FOLDER.glob("one_gpu/*.yaml")), *sorted(FOLDER.glob("nodes/*.yaml"))]
GPUS = {"one_gpu": 1, "nodes": 16}  # of which configs/ speaks
IMAGENET = 1_281_167  # images of ImageNet-1k
ON_FOLDERS = [path for path in CONFIGS if not path.stem.startswith("fashion_mnist")]


def name_of(path: Path) -> str:
    return str(path.relative_to(FOLDER).with_suffix(""))


def read(name: str) -> Config:
    return load_config(FOLDER / f"{name}.yaml", ["data.root=/images"])


def test_there_are_recipes() -> None:
    assert CONFIGS


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_recipe_can_be_run(path: Path) -> None:
    """Models are made without memory for their weights, so the largest fit here too."""
    # The folder is the one thing that a recipe leaves to its user.
    config = load_config(path, ["data.root=/images"] if path in ON_FOLDERS else [])
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


# arXiv:2301.08243, appendix A.1, the released weights, and images of a device as in the published code.
PUBLISHED: dict[str, dict[str, Any]] = {
    "ijepa_vit_huge_14": {
        "size": (1280, 32, 16, 14, 224), "predictor": (384, 12, 16), "epochs": (300, 40), "micro": 128,
        "parameters": 630.8e6,
    },
    "ijepa_vit_huge_16_448": {
        "size": (1280, 32, 16, 16, 448), "predictor": (384, 12, 16), "epochs": (300, 40), "micro": 16,
        "parameters": 630.8e6 + 3 * (16**2 - 14**2) * 1280,
    },
    "ijepa_vit_giant_16": {
        "size": (1408, 40, 16, 16, 224), "predictor": (384, 16, 16), "epochs": (44, 3), "micro": 16,
        "parameters": 1011.3e6,
    },
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_recipe_is_as_published(name: str) -> None:
    config, known = read(name), PUBLISHED[name]
    optim, masks, data = config.optim, config.masks, config.data
    assert (optim.global_batch, optim.epochs, optim.warmup_epochs) == (2048, *known["epochs"])
    assert (optim.start_lr, optim.lr, optim.final_lr) == (2e-4, 1e-3, 1e-6)
    assert (optim.weight_decay, optim.final_weight_decay) == (0.04, 0.4)
    assert (optim.momentum, optim.final_momentum, optim.precision) == (0.996, 1.0, "bf16")
    assert (optim.clip_grad, optim.betas, optim.eps) == (0.0, (0.9, 0.999), 1e-8)
    assert (masks.mode, masks.target_blocks, masks.min_keep) == ("truncate", 4, 10)
    assert (masks.target_scale, masks.target_aspect) == ((0.15, 0.2), (0.75, 1.5))
    assert (masks.context_scale, masks.context_aspect) == ((0.85, 1.0), (1.0, 1.0))
    assert (data.crop_scale, data.flip) == ((0.3, 1.0), 0.0)
    assert config.model.init == "published"
    with torch.device("meta"):
        model = build_model(config)
    assert isinstance(model, JEPA)
    shape, predictor = model.encoder.shape, model.predictor
    assert (shape.width, shape.depth, shape.heads, shape.patch_size, data.image_size) == known["size"]
    width, heads = predictor.predictor_norm.weight.numel(), build_heads(config)["predictor"]
    assert (width, len(predictor.predictor_blocks), heads) == known["predictor"]
    # Positions are no parameters here.
    assert sum(p.numel() for p in model.encoder.parameters()) == pytest.approx(known["parameters"], rel=1e-3)
    for folder, gpus in GPUS.items():
        images = micro_batch(read(f"{folder}/{name}"), gpus)
        assert images == known["micro"], "masks are cut to the shortest of a micro-batch"


@pytest.mark.parametrize("path", ON_FOLDERS, ids=name_of)
def test_the_average_remembers_as_many_images_as_published(path: Path) -> None:
    """Which docs/recipes.md advises: .996 is of steps of 2,048 images."""
    optim = read(path.stem).optim
    assert optim.momentum == pytest.approx(0.996 ** (optim.global_batch / 2048), abs=1e-5) or (
        read(path.stem).objective.name == "mae"
    )


def twin_of(name: str) -> str:
    return name.replace("ijepa_", "mae_") if name.startswith("ijepa_") else f"{name}_mae"


RECIPES = [path.stem for path in ON_FOLDERS if read(path.stem).objective.name == "jepa"]
MAE_EPOCHS = {"ijepa_vit_huge_14": 1600}


def test_there_is_one_of_each_size() -> None:
    sizes = {
        (config.model.size, config.model.patch_size, config.data.image_size) for config in map(read, RECIPES)
    }
    named = {(size, 16, 224) for size in ("tiny", "small", "base", "large", "giant")}
    assert sizes == named | {("huge", 14, 224), ("huge", 16, 448)}


@pytest.mark.parametrize("name", RECIPES)
def test_each_has_a_twin_of_mae_as_published(name: str) -> None:
    """arXiv:2111.06377, table 8, and the published code."""
    config, own = read(twin_of(name)), read(name)
    optim, model = config.optim, config.model
    assert (config.objective.name, config.objective.norm_pix_loss) == ("mae", True)
    assert (config.masks.mask_ratio, model.init) == (0.75, "published")
    assert (model.decoder_width, model.decoder_depth, model.decoder_heads) == (512, 8, 16)
    assert (optim.global_batch, optim.warmup_epochs) == (4096, 40)
    assert optim.epochs == MAE_EPOCHS.get(name, 800)
    assert optim.lr == pytest.approx(1.5e-4 * optim.global_batch / 256)
    assert (optim.start_lr, optim.final_lr) == (0.0, 0.0)
    assert (optim.weight_decay, optim.final_weight_decay, optim.betas) == (0.05, 0.05, (0.9, 0.95))
    assert (config.data.crop_scale, config.data.flip) == ((0.2, 1.0), 0.5)
    assert replace(build_shape(config), class_token=False) == build_shape(own)


def test_every_recipe_has_every_variant() -> None:
    names = {path.stem for path in ON_FOLDERS}
    assert names == {*RECIPES, *map(twin_of, RECIPES)}
    assert sorted(name_of(path) for path in VARIANTS) == sorted(f"{f}/{name}" for f in GPUS for name in names)


@pytest.mark.parametrize("path", VARIANTS, ids=name_of)
def test_a_variant_gives_the_same_results_and_fits(path: Path) -> None:
    config, recipe = read(name_of(path)), read(path.stem)
    assert differences(config.results_part(), recipe.results_part()) == []
    assert config.run.name == path.stem, "the same folder, so that one goes on where the other stopped"
    gpus = GPUS[path.parent.name]
    check_stage(config, is_alone(config, gpus))
    plan = make_plan(config, gpus, Device(80e9, 989e12, 0.35), IMAGENET, 220)
    assert plan.configured is not None
    assert plan.configured.fits
    comment = path.read_text().splitlines()[0]
    at_a_time = plan.configured.images
    assert f"{at_a_time} images" in comment or (plan.configured.accumulation == 1 and "all images" in comment)
