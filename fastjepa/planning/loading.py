"""How fast one core of this machine loads the images of a run."""

import time

import torch

from fastjepa.config import Config
from fastjepa.data.views import read_views
from fastjepa.engine.build import build_augmentation, build_reading
from fastjepa.engine.images import RunImages

CHUNK = 16  # images between two looks at the clock


def images_per_core_second(config: Config, images: RunImages, seconds: float = 3.0) -> float:
    """Images of the run, spread over the set, that a core decodes, crops and resizes while it works.

    What else the machine does changes it little: only the time that this process had the core counts.

    Raises:
        TooManyUnreadable: of the images tried.
    """
    augmentation, reading, size = build_augmentation(config), build_reading(config), config.data.image_size
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as a loader process has it
    try:
        read, begin_s = -CHUNK, time.process_time()
        while read <= 0 or time.process_time() - begin_s < seconds:
            if read == 0:  # what is loaded once, at the first images, is not counted
                begin_s = time.process_time()
            index = [(read + each) * 7919 % len(images.train) for each in range(CHUNK)]
            read_views(images.train, index, size, augmentation, config.run.seed, 0, reading)
            read += CHUNK
        return read / (time.process_time() - begin_s)
    finally:
        torch.set_num_threads(threads)
