"""Runs of a small encoder of four blocks, saved as training saves them, and folders of real images."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from PIL import Image

from fastjepa.data.fashion_mnist import FashionMNIST

if TYPE_CHECKING:
    from tests.conftest import Trainer

NAMES = ("bag", "boot", "coat", "dress", "shirt")


@pytest.fixture(scope="session")
def run(trainer_at: "Callable[[Path], Trainer]", tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of I-JEPA, with checkpoints of steps 5 and 10."""
    trainer = trainer_at(tmp_path_factory.mktemp("probe"))
    trainer("model.depth=4").check()
    return trainer.run


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """60 grey images in five class folders."""
    root = tmp_path_factory.mktemp("images")
    clothes = FashionMNIST(split="test")
    for label, name in enumerate(NAMES):
        (root / name).mkdir()
        for index in (clothes.labels == label).nonzero()[:12, 0].tolist():
            Image.fromarray(clothes.images[index, 0].numpy()).save(root / name / f"{index}.png")
    return root
