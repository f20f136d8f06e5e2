"""Packing real images: resized in other processes, killed and taken up, and nothing lost or written twice."""

import json
import os
import subprocess
import sys
import time
from io import BytesIO
from pathlib import Path

import pytest
import torch
from PIL import Image

from fastjepa.data.folder import ImageFolder
from fastjepa.data.packing.encode import Packing
from fastjepa.data.packing.journal import PackError
from fastjepa.data.packing.pack import pack
from fastjepa.data.shards.shard_set import ShardSet
from tests.data.pictures import jpeg, photo, write_photos

SMALL = Packing(short_side=24, quality=85, shard_bytes=60_000)


def shards_of(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(out.glob("*.tar"))}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_photos(tmp_path_factory.mktemp("photos") / "images", 120, classes=3)
    (folder / "class_1" / "bad.jpg").write_bytes(b"no image")
    (folder / "class_2" / "empty.png").touch()
    return folder


@pytest.fixture(scope="module")
def packed(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("packed") / "out"
    report = pack(folder, out, SMALL, workers=2)
    assert (report.images, report.packed, report.classes) == (122, 120, 3)
    return out


def test_images_are_resized_shuffled_and_labelled(folder: Path, packed: Path) -> None:
    images, shards = ImageFolder(folder), ShardSet(packed)
    assert len(shards) == 120
    assert len(shards.shard_ends) > 2
    assert shards.class_names == ("class_0", "class_1", "class_2")
    assert shards.labels is not None
    assert images.labels is not None
    numbers = [int(Path(shards.path(i)).stem) for i in range(120)]
    assert numbers != sorted(numbers)
    assert torch.equal(shards.labels, images.labels[numbers])
    for place in (0, 60, 119):
        whole, small = images.read(numbers[place]), shards.read(place)
        assert min(small.size) == 24
        assert abs(small.width / small.height - whole.width / whole.height) < 0.04
        expected = torch.frombuffer(bytearray(whole.resize(small.size).tobytes()), dtype=torch.uint8).float()
        got = torch.frombuffer(bytearray(small.tobytes()), dtype=torch.uint8).float()
        assert (expected - got).abs().mean() < 8  # of 255, most of it JPEG's
    for path in packed.glob("*.tar"):
        assert path.stat().st_size <= SMALL.shard_bytes


def test_what_was_skipped_is_named_with_its_reason(folder: Path, packed: Path) -> None:
    report = json.loads((packed / "report.json").read_text())
    assert report["skipped"] == {
        str(folder / "class_1" / "bad.jpg"): "UnidentifiedImageError: cannot identify image file",
        str(folder / "class_2" / "empty.png"): "UnidentifiedImageError: cannot identify image file",
    }
    assert report["reasons"] == {"UnidentifiedImageError": 2}
    assert report["packed"] == 120


def test_workers_change_nothing(folder: Path, packed: Path, tmp_path: Path) -> None:
    pack(folder, tmp_path / "out", SMALL, workers=0)
    assert shards_of(tmp_path / "out") == shards_of(packed)


def test_a_finished_pack_writes_no_shard_again(folder: Path, packed: Path) -> None:
    before = {path.name: path.stat().st_mtime_ns for path in packed.glob("*.tar")}
    assert pack(folder, packed, SMALL).packed == 120
    assert {path.name: path.stat().st_mtime_ns for path in packed.glob("*.tar")} == before


@pytest.mark.parametrize("shards", [1, 3])
def test_killed_it_goes_on_where_it_was(folder: Path, packed: Path, tmp_path: Path, shards: int) -> None:
    out = tmp_path / "out"
    command = [
        sys.executable, "-m", "fastjepa.cli", "data", "pack", str(folder), str(out),
        "--short-side", "24", "--quality", "85", "--shard-size", "60KB", "--workers", "1",
    ]  # fmt: skip
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    try:
        deadline_s = time.monotonic() + 60
        while len(list(out.glob("*.tar"))) < shards:
            assert time.monotonic() < deadline_s
            assert process.poll() is None, "it ended before it could be killed"
            time.sleep(0.0005)
    finally:
        process.kill()
        process.wait()
    assert not (out / "index.safetensors").exists(), "killed too late to show anything"
    finished = {path: path.stat() for path in out.glob("*.tar")}
    assert pack(folder, out, SMALL).packed == 120
    for path, before in finished.items():
        assert (path.stat().st_ino, path.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    assert shards_of(out) == shards_of(packed)
    assert not list(out.glob("*.tmp"))


@pytest.mark.parametrize("harm", ["not yet named", "half a line"])
def test_killed_between_two_writes_it_loses_nothing(
    folder: Path, packed: Path, tmp_path: Path, harm: str
) -> None:
    out = tmp_path / "out"
    pack(folder, out, SMALL)
    journal = out / "packed.jsonl"
    lines = journal.read_text().splitlines(keepends=True)
    last = out / json.loads(lines[-1])["shard"]
    if harm == "not yet named":
        last.rename(f"{last}.tmp")
    else:
        journal.write_text("".join(lines[:-1]) + lines[-1][:20])
        last.unlink()
    (out / "index.safetensors").unlink()
    assert pack(folder, out, SMALL).packed == 120
    assert shards_of(out) == shards_of(packed)
    assert journal.read_text().splitlines(keepends=True) == lines


def test_what_does_not_belong_together_is_refused(folder: Path, tmp_path: Path) -> None:
    images, out = write_photos(tmp_path / "few", 6), tmp_path / "out"
    pack(images, out, SMALL)
    with pytest.raises(PackError, match="begun otherwise: quality was 85, is 90"):
        pack(images, out, Packing(24, 90, 60_000))
    (images / "class_0" / "new.jpg").write_bytes(jpeg())
    with pytest.raises(PackError, match="are others than when the pack into"):
        pack(images, out, SMALL)
    (images / "class_0" / "new.jpg").unlink()
    next(out.glob("*.tar")).unlink()
    with pytest.raises(PackError, match=r"shard-000000\.tar is missing or not what was packed"):
        pack(images, out, SMALL)
    with pytest.raises(PackError, match="is not empty and holds no pack"):
        pack(images, images, SMALL)


HOLD = """
import sys
from pathlib import Path
from fastjepa.data.folder import ImageFolder
from fastjepa.data.packing.encode import Packing
from fastjepa.data.packing.journal import open_journal

with open_journal(Path(sys.argv[2]), ImageFolder(sys.argv[1]), Packing(24, 85, 60_000)):
    print("has it", flush=True)
    sys.stdin.read()
"""


def test_two_do_not_pack_into_one_folder(tmp_path: Path) -> None:
    images, out = write_photos(tmp_path / "few", 6), tmp_path / "out"
    command = [sys.executable, "-c", HOLD, str(images), str(out)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == b"has it\n"
        with pytest.raises(PackError, match="another process is packing into"):
            pack(images, out, SMALL)
        other.communicate()
    assert pack(images, out, SMALL).packed == 6


def test_parts_of_a_data_set_are_no_classes(tmp_path: Path) -> None:
    for part in ("train", "val"):
        write_photos(tmp_path / "images" / part, 2)
    with pytest.raises(
        ValueError, match="train, val, which are parts of a data set and no classes: give one"
    ):
        pack(tmp_path / "images", tmp_path / "out", SMALL)
    assert not (tmp_path / "out").exists()


def test_a_folder_without_a_readable_image(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.jpg").write_bytes(b"")
    with pytest.raises(PackError, match=r"none of the 1 images in .* can be read; the first: .*a\.jpg"):
        pack(tmp_path / "images", tmp_path / "out", SMALL)
    assert not (tmp_path / "out" / "index.safetensors").exists()


def test_small_files_are_copied_byte_for_byte_if_asked(tmp_path: Path) -> None:
    images = tmp_path / "images"
    images.mkdir()
    photo(20, 30).save(images / "a.png")
    (images / "b.jpg").write_bytes(jpeg(100, 80))
    (images / "c.jpg").write_bytes(jpeg(20, 24)[:300])  # small enough, and broken
    report = pack(images, tmp_path / "out", Packing(short_side=24, copy_small=True, in_order=True))
    assert (report.packed, report.copied, len(report.skipped)) == (2, 1, 1)
    shards = ShardSet(tmp_path / "out")
    assert shards.encoded(0) == (images / "a.png").read_bytes()
    assert [Path(shards.path(i)).name for i in range(2)] == ["00000000.png", "00000001.jpg"]
    assert shards.labels is None
    assert min(shards.read(1).size) == 24


def test_odd_images_are_handled(tmp_path: Path) -> None:
    images = tmp_path / "images"
    images.mkdir()
    picture = photo(64, 48)
    picture.convert("CMYK").save(images / "cmyk.jpg")
    Image.fromarray(torch.arange(3072).view(48, 64).mul(20).numpy().astype("uint16")).save(
        images / "deep.png"
    )
    picture.quantize(16).save(images / "palette.png")
    picture.convert("RGBA").save(images / "transparent.png")
    picture.convert("L").save(images / "grey.jpg")
    exif = Image.Exif()
    exif[0x0112] = 6
    picture.save(images / "turned.jpg", exif=exif)
    report = pack(images, tmp_path / "out", Packing(short_side=24, in_order=True))
    assert (report.packed, report.skipped) == (6, {})
    shards = ShardSet(tmp_path / "out")
    names = sorted(os.listdir(images))
    for number, name in enumerate(names):
        assert shards.read(number).size == ((24, 32) if name == "turned.jpg" else (32, 24))
        stored = Image.open(BytesIO(shards.encoded(number)))
        assert (stored.format, stored.mode) == ("JPEG", "RGB")


def test_a_full_drive_leaves_what_was_finished(folder: Path, packed: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))\n"
    limit += "import signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
    limit += "import sys; from fastjepa.cli import main; sys.exit(main(sys.argv[1:]))"
    arguments = ["data", "pack", str(folder), str(out), "--short-side", "24", "--quality", "85"]
    failed = subprocess.run(
        [sys.executable, "-c", limit, *arguments, "--shard-size", "60KB", "--workers", "1"],
        capture_output=True,
        text=True,
    )
    assert failed.returncode == 1
    assert failed.stderr.startswith("error: ")
    assert "File too large" in failed.stderr
    assert "Traceback" not in failed.stderr
    assert not shards_of(out)
    assert pack(folder, out, SMALL).packed == 120
    assert shards_of(out) == shards_of(packed)


def test_an_image_too_long_for_a_jpeg_is_skipped_and_does_not_end_the_pack(tmp_path: Path) -> None:
    images = write_photos(tmp_path / "images", 4)
    Image.new("L", (1, 70_000)).save(images / "class_0" / "long.png")
    report = pack(images, tmp_path / "out", SMALL)
    assert report.packed == 4
    assert report.skipped == {
        str(images / "class_0" / "long.png"): "ValueError: 1 x 70000 pixels are too long for a JPEG"
    }


def test_names_are_kept_whatever_they_hold(tmp_path: Path) -> None:
    images = write_photos(tmp_path / "images", 4)
    names = "a\u2028b", os.fsdecode(b"c\xff")
    for number, name in enumerate(names):
        (images / f"class_{number}").rename(images / name)
    bad = images / os.fsdecode(b"bad\xff.jpg")
    for folder in names:
        (images / folder / bad.name).write_bytes(b"no image")
    report = pack(images, tmp_path / "out", SMALL)
    assert (report.packed, len(report.skipped)) == (4, 2)
    assert set(json.loads((tmp_path / "out" / "report.json").read_text("utf-8"))["skipped"]) == set(
        report.skipped
    )
    assert ShardSet(tmp_path / "out").class_names == tuple(sorted(names))


def test_a_class_that_is_no_line_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    images = write_photos(tmp_path / "images", 4)
    (images / "class_0").rename(images / "class\n0")
    with pytest.raises(PackError, match=r"class folder 'class\\n0' has a line break .* rename the folder"):
        pack(images, tmp_path / "out", SMALL)
    assert not (tmp_path / "out").exists()


def test_killed_before_it_began_it_begins(tmp_path: Path) -> None:
    images = write_photos(tmp_path / "images", 4)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "pack.json.tmp").write_text("{")
    assert pack(images, tmp_path / "out", SMALL).packed == 4
