"""Images that cannot be read, in a real folder: a few are skipped and counted, many stop the run."""

import zlib
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image

from fastjepa.data.folder import ImageFolder
from fastjepa.data.order import GlobalOrder
from tests.faults.evidence import Watched, lines_with
from tests.faults.table import Row

IMAGES, BATCH, EPOCHS = 300, 20, 2
STEPS = EPOCHS * IMAGES // BATCH
RUN = (
    "data.name=folder",
    "data.hold_out=0",
    "data.channels=3",
    "data.mean=[0.5, 0.5, 0.5]",
    "data.std=[0.5, 0.5, 0.5]",
    f"optim.global_batch={BATCH}",
    f"optim.steps={STEPS}",
    "run.save_every=7",
)


def write_images(folder: Path) -> list[Path]:
    folder.mkdir()
    generator = torch.Generator().manual_seed(0)
    for number in range(IMAGES):
        pixels = torch.randint(256, (40, 32, 3), dtype=torch.uint8, generator=generator).numpy()
        Image.fromarray(pixels).save(folder / f"{number:03d}.png")
    return sorted(folder.iterdir())


def write_huge(file: Path) -> None:
    """A small file that says it has a million times a million pixels."""
    content = bytearray(file.read_bytes())
    width_at = content.index(b"IHDR") + 4
    content[width_at : width_at + 8] = (1_000_000).to_bytes(4, "big") * 2
    end = width_at + 13
    content[end : end + 4] = zlib.crc32(content[width_at - 4 : end]).to_bytes(4, "big")
    file.write_bytes(content)


def test_one_per_cent(watched: Watched, table: Callable[[str, str], Row]) -> None:
    row = table("1 % corrupt, empty and huge images", "each is named and counted, the next in its place")
    odd = table("CMYK, 16-bit, grey and transparent images", "trained on")
    folder = watched.trainer.home / "images"
    files = write_images(folder)
    corrupt, empty, huge = files[13], files[101], files[290]
    corrupt.write_bytes(corrupt.read_bytes()[:600])
    empty.write_bytes(b"")
    write_huge(huge)
    Image.open(files[20]).convert("CMYK").save(files[20], "JPEG")
    Image.fromarray(torch.arange(1024).view(32, 32).mul(60).numpy().astype("uint16")).save(files[21])
    Image.open(files[22]).convert("L").save(files[22])
    Image.open(files[23]).convert("RGBA").save(files[23])
    row.times, odd.times = 3, 4

    middle = STEPS // 2 - 3
    process = watched.start(*RUN, f"data.root={folder}", "speed.workers=2", gates=[middle])
    with watched.standing_at(process, middle):
        process.kill()
    said = watched.finish(process).out
    done = watched(*RUN, f"data.root={folder}", "speed.workers=2").check()
    for path in (corrupt, empty, huge):
        assert len(lines_with(done.out, f"warning: skipped {path}: ")) == 1, done.out
        assert len(lines_with(said, f"warning: skipped {path}: ")) <= 1
    assert lines_with(done.out, "3 of 300 images could not be read and were skipped")
    assert not [path for path in files[20:24] if str(path) in done.out]

    # The order of images is a pure function; in the place of a bad one comes the next.
    order, replaced = GlobalOrder(IMAGES, BATCH, seed=0), {13: 14, 101: 102, 290: 291}
    assert ImageFolder(folder).path(101) == str(empty)
    trained_on = watched.witness.trained_on()
    for step in range(STEPS):
        epoch, images = order.batch(step)
        expected = Counter((epoch, replaced.get(image, image)) for image in images.tolist())
        got = Counter((seen.epoch, seen.image) for seen in trained_on[step])
        for found in (row, odd):
            found.images_lost = (found.images_lost or 0) + (expected - got).total()
        assert got == expected
    assert trained_on.keys() == set(range(STEPS))


@pytest.mark.slow_fault
def test_more_than_five_per_cent(watched: Watched, table: Callable[[str, str], Row]) -> None:
    row = table("more than 5 % of the images are bad", "stops; the first of them are named")
    folder = watched.trainer.home / "images"
    for path in write_images(folder)[::15]:  # 20 of 300
        path.write_bytes(path.read_bytes()[:100])
        row.times += 1
    failed = watched(*RUN, f"data.root={folder}", "speed.workers=2").check(1)
    assert len(failed.errors) == 1
    assert "images cannot be read; at most 5% are skipped. Repair or remove them." in failed.errors[0]
    assert len(lines_with(failed.err, str(folder), ".png: ")) >= 5
