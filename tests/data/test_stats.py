from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastjepa.data.packing.encode import Packing
from fastjepa.data.packing.pack import pack
from fastjepa.data.shards.shard_set import ShardSet
from fastjepa.data.stats import Stats, measure, open_set, say
from tests.data.pictures import photo


def look(root: Path, limit: int | None = None, size: int = 16, workers: int = 0) -> Stats:
    return measure(
        open_set(str(root)), limit, size, workers, lambda what, total, unit: nullcontext(lambda more: None)
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two classes: squares of one colour each; one grey and one broken file."""
    root = tmp_path / "images"
    for number, (name, colour) in enumerate([("a", (0, 51, 255)), ("a", (255, 51, 0)), ("b", (0, 51, 0))]):
        (root / name).mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (20 + 10 * number, 20), colour).save(root / name / f"{number}.png")
    Image.new("L", (40, 80), 102).save(root / "b" / "grey.png")
    (root / "b" / "broken.jpg").write_bytes(b"no image")
    return root


def test_counts_sizes_formats_and_bad_images(folder: Path) -> None:
    stats = look(folder)
    assert (stats.images, stats.looked_at, stats.labels) == (5, 5, 2)
    assert stats.of_class == {"a": 2, "b": 3}
    assert stats.formats == {"PNG RGB": 3, "PNG L": 1}
    assert (stats.width["smallest"], stats.width["largest"], stats.height["largest"]) == (20, 40, 80)
    assert (stats.aspect["smallest"], stats.aspect["largest"]) == (0.5, 2.0)
    assert stats.bad == {
        str(folder / "b" / "broken.jpg"): "UnidentifiedImageError: cannot identify image file"
    }
    assert "cannot be read                  1\n" in say(stats)


def test_mean_and_spread_are_in_the_form_of_the_configuration(folder: Path) -> None:
    stats = look(folder)
    expected = np.array([[0, 0.2, 1], [1, 0.2, 0], [0, 0.2, 0], [0.4, 0.4, 0.4]])
    np.testing.assert_allclose(stats.mean, expected.mean(0), atol=1e-4)
    np.testing.assert_allclose(stats.std, expected.std(0), atol=1e-4)
    assert say(stats).endswith("data.mean=[0.35,0.25,0.35] data.std=[0.4093,0.0866,0.4093]")


def test_workers_and_shards_change_nothing_and_a_part_is_spread(tmp_path: Path) -> None:
    root = tmp_path / "images"
    root.mkdir()
    for number in range(20):
        photo(40, 30, number).save(root / f"{number:02}.png")
    whole = look(root)
    assert look(root, workers=2) == whole
    pack(root, tmp_path / "out", Packing(copy_small=True, in_order=True))
    assert isinstance(open_set(str(tmp_path / "out")), ShardSet)
    assert look(tmp_path / "out") == whole
    part = look(root, limit=5)
    assert (part.images, part.looked_at) == (20, 5)
    assert part.mean != whole.mean


def test_a_set_without_a_readable_image(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(b"")
    with pytest.raises(ValueError, match=r"none of 1 images can be read; the first: .*a\.jpg"):
        look(tmp_path)
