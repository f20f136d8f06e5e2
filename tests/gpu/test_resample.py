"""Crops resized on the GPU, as a run does it: pinned, copied ahead, and the views of the CPU."""

from pathlib import Path

import pytest
import torch

from fastjepa.data.folder import ImageFolder
from fastjepa.data.loader import make_loader
from fastjepa.data.order import GlobalOrder
from fastjepa.data.transforms import Augmentation
from fastjepa.data.views import Reading
from fastjepa.engine.prefetch import in_steps, on_device
from fastjepa.masks import RandomMasks
from tests.data.pictures import write_photos


@pytest.mark.parametrize("ahead", [False, True])
def test_views_are_those_of_the_cpu(tmp_path: Path, ahead: bool) -> None:
    images = ImageFolder(write_photos(tmp_path, 32, width=300, height=220))

    def batches(reading: Reading, pin_memory: bool) -> list[torch.Tensor]:
        loader = make_loader(
            images, RandomMasks((4, 4), seed=0), GlobalOrder(32, 8, 0), size=64,
            augmentation=Augmentation((0.3, 1.0), flip_probability=0.5), seed=0, last_step=8,
            workers=2, pin_memory=pin_memory, reading=reading,
        )  # fmt: skip
        device = torch.device("cuda" if pin_memory else "cpu")
        return [
            batch.images.cpu() for step in on_device(in_steps(loader, 1), device, ahead) for batch in step
        ]

    there = batches(Reading(augment="device"), pin_memory=True)
    for views, expected in zip(there, batches(Reading(), pin_memory=False), strict=True):
        # One level as on the CPU, and one more where matrices are multiplied in TF32.
        assert (views.int() - expected.int()).abs().max() <= 2
