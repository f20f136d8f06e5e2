"""`fastjepa data`: what it writes, what it says, and what it refuses."""

import json
import os
from pathlib import Path

import pytest

from fastjepa.cli import main
from fastjepa.data.shards.shard_set import ShardSet
from tests.data.pictures import write_photos, write_shard
from tests.data.ranges import served

Said = pytest.CaptureFixture[str]


def refused(said: Said, *arguments: str) -> str:
    assert main(["data", *arguments]) == 1
    out, err = said.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    return err


def test_pack_says_what_became_of_the_images(tmp_path: Path, capsys: Said) -> None:
    images, out = write_photos(tmp_path / "images", 6), tmp_path / "out"
    (images / "class_0" / "bad.jpg").write_bytes(b"")
    arguments = ["data", "pack", str(images), str(out), "--short-side", "24", "--workers", "1"]
    assert main(arguments) == 0
    said = capsys.readouterr()
    assert said.err == ""  # no terminal, no progress bar
    assert said.out.startswith(f"Packed 6 of 7 images into 1 shards in {out}: ")
    assert f"  {images / 'class_0' / 'bad.jpg'}: UnidentifiedImageError" in said.out
    assert f"data.name=shards data.root={out}" in said.out
    assert json.loads((out / "report.json").read_text())["packed"] == 6
    assert "quality was 90, is 80" in refused(capsys, *arguments[1:], "--quality", "80")


def test_index_beside_the_shards_and_not_over_one_that_is_there(tmp_path: Path, capsys: Said) -> None:
    for number in range(3):
        write_shard(tmp_path / f"{number}.tar", {f"{number}.jpg": b"a", f"{number}.cls": b"1"})
    assert main(["data", "index", str(tmp_path)]) == 0
    index = tmp_path / "index.safetensors"
    assert capsys.readouterr().out == f"Wrote {index}: 3 images in 3 shards, in 2 classes\n"
    before = index.read_bytes()
    assert f"{index} exists; give another name with --out, or --force" in refused(
        capsys, "index", str(tmp_path)
    )
    assert index.read_bytes() == before
    assert main(["data", "index", "--force", "--no-labels", str(tmp_path / "1.tar")]) == 0
    assert len(ShardSet(tmp_path)) == 1
    assert ShardSet(tmp_path).labels is None


def test_index_of_urls(tmp_path: Path, capsys: Said) -> None:
    write_shard(tmp_path / "a.tar", {"1.jpg": b"abc"})
    with served(tmp_path) as (url, _):
        assert "say with --out where the index goes" in refused(capsys, "index", f"{url}/a.tar")
        assert f"there is no {url}/b.tar" in refused(
            capsys, "index", f"{url}/b.tar", "--out", str(tmp_path / "i")
        )
        assert main(["data", "index", f"{url}/a.tar", "--out", str(tmp_path / "i")]) == 0
        assert ShardSet(tmp_path / "i").encoded(0) == b"abc"


def test_stats_are_printed_and_written(tmp_path: Path, capsys: Said) -> None:
    images, file = write_photos(tmp_path / "images", 6), tmp_path / "stats.json"
    arguments = ["data", "stats", str(images), "--size", "16", "--workers", "1", "--json", str(file)]
    assert main(arguments) == 0
    assert capsys.readouterr().out.startswith("6 images, 2 classes\n")
    assert json.loads(file.read_text())["of_class"] == {"class_0": 3, "class_1": 3}
    assert "exists; give another name, or --force" in refused(capsys, *arguments[1:])


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("index", "{}/nowhere.tar"), "cannot read the shard {}/nowhere.tar: No such file"),
        (("index", "{}/empty"), "no shards (*.tar) in {}/empty"),
        (("pack", "{}/nowhere", "{}/out"), "{}/nowhere is not a folder"),
        (("pack", "{}/empty", "{}/out"), "no images below {}/empty"),
        (("stats", "{}/nowhere"), "{}/nowhere is not a folder"),
        (("stats", "{}/empty"), "no images below {}/empty"),
    ],
)
def test_what_is_not_there(tmp_path: Path, capsys: Said, arguments: tuple[str, ...], said: str) -> None:
    (tmp_path / "empty").mkdir()
    assert said.format(tmp_path) in refused(capsys, *(argument.format(tmp_path) for argument in arguments))
    assert [path.name for path in tmp_path.iterdir()] == ["empty"]


@pytest.mark.parametrize(
    ("option", "value"),
    [("--quality", "0"), ("--quality", "101"), ("--shard-size", "512"), ("--shard-size", "x MB")],
)
def test_what_an_option_may_be(tmp_path: Path, capsys: Said, option: str, value: str) -> None:
    with pytest.raises(SystemExit):
        main(["data", "pack", str(tmp_path), str(tmp_path / "out"), option, value])
    assert f"{option}: must be " in capsys.readouterr().err


def test_names_that_are_no_utf_8_are_printed(tmp_path: Path, capsys: Said) -> None:
    images = write_photos(tmp_path / "images", 4)
    (images / "class_0" / os.fsdecode(b"bad\xff.jpg")).write_bytes(b"no image")
    assert main(["data", "pack", str(images), str(tmp_path / "out"), "--workers", "1"]) == 0
    assert r"/bad\udcff.jpg: UnidentifiedImageError" in capsys.readouterr().out
    assert main(["data", "stats", str(images), "--size", "8", "--workers", "1"]) == 0
    assert r"/bad\udcff.jpg: UnidentifiedImageError" in capsys.readouterr().out


def test_stats_that_could_not_be_written_are_not_measured(tmp_path: Path, capsys: Said) -> None:
    images = write_photos(tmp_path / "images", 2)
    assert "there is no folder" in refused(
        capsys, "stats", str(images), "--json", str(tmp_path / "nowhere" / "x.json")
    )
