import os
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastjepa.data.shards.build import index_shards
from fastjepa.data.shards.index import (
    INDEX_NAME,
    IndexFileError,
    ShardIndex,
    read_index,
    shard_ends,
    write_index,
)
from fastjepa.data.shards.scan import ShardError
from fastjepa.data.shards.store import Stamp
from tests.data.pictures import write_shard

NAMES = st.text("abcé/._0", min_size=1, max_size=30)


@st.composite
def indices(draw: st.DrawFn) -> ShardIndex:
    counts = draw(st.lists(st.integers(0, 5), min_size=1, max_size=5).filter(any))
    images = sum(counts)
    encoded = [os.fsencode(draw(NAMES)) for _ in range(images)]
    names = {
        "names": torch.frombuffer(bytearray(b"".join(encoded)), dtype=torch.uint8),
        "name_ends": torch.tensor([len(name) for name in encoded]).cumsum(0),
    }
    is_labelled = draw(st.booleans())
    return ShardIndex(
        shards=tuple(f"s3://bucket/{shard}.tar" for shard in range(len(counts))),
        stamps=tuple(Stamp(draw(st.integers(0, 2**50)), draw(NAMES)) for _ in counts),
        shard_ends=shard_ends(counts),
        offsets=torch.tensor(draw(st.lists(st.integers(0, 2**50), min_size=images, max_size=images))),
        sizes=torch.arange(images, dtype=torch.int32),
        labels=torch.arange(images, dtype=torch.int32) if is_labelled else None,
        class_names=tuple(map(str, range(images))) if is_labelled else None,
        **names,
    )


@settings(max_examples=40)
@given(index=indices())
def test_what_is_written_is_read(tmp_path_factory: pytest.TempPathFactory, index: ShardIndex) -> None:
    folder = tmp_path_factory.mktemp("index")
    write_index(index, folder / INDEX_NAME)
    again = read_index(folder)
    assert (again.shards, again.stamps, again.class_names) == (index.shards, index.stamps, index.class_names)
    for name in ("shard_ends", "offsets", "sizes", "names", "name_ends"):
        assert torch.equal(getattr(again, name), getattr(index, name)), name
    assert (again.labels is None) == (index.labels is None)
    assert [again.name(i) for i in range(len(again))] == [index.name(i) for i in range(len(index))]
    ends = index.shard_ends.tolist()
    for image in range(len(index)):
        shard = again.shard_of(image)
        assert (ends[shard - 1] if shard else 0) <= image < ends[shard]
    assert os.listdir(folder) == [INDEX_NAME]


def test_an_index_moves_with_its_shards_and_others_may_read_it(tmp_path: Path) -> None:
    folder = tmp_path / "old"
    folder.mkdir()
    write_shard(folder / "a.tar", {"1.jpg": b"a"})
    write_index(index_shards([str(folder / "a.tar")]), folder / INDEX_NAME)
    assert (folder / INDEX_NAME).stat().st_mode == (folder / "a.tar").stat().st_mode
    moved = shutil.move(folder, tmp_path / "new")
    assert read_index(moved).shards == (f"{moved}/a.tar",)


def test_what_is_no_index_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        IndexFileError, match=r"there is no .*nowhere; data\.root must be a folder of indexed"
    ):
        read_index(tmp_path / "nowhere")
    with pytest.raises(IndexFileError, match=r"holds no shards .*data\.name=folder.*fastjepa data pack"):
        read_index(tmp_path)
    write_shard(tmp_path / "a.tar", {"1.jpg": b"a"})
    with pytest.raises(IndexFileError, match=rf"no index; .*: fastjepa data index {tmp_path}/\*\.tar"):
        read_index(tmp_path)
    for content in (b"", b"\x80\x04N.", b"\xff" * 100):  # the second is a pickle
        (tmp_path / INDEX_NAME).write_bytes(content)
        with pytest.raises(IndexFileError, match="is no index of shards"):
            read_index(tmp_path)


def index_of(tmp_path: Path, members: dict[str, bytes]) -> ShardIndex:
    return index_shards([str(write_shard(tmp_path / "a.tar", members))])


def test_labels_must_be_whole(tmp_path: Path) -> None:
    some = {"1.jpg": b"a", "1.cls": b"0", "2.jpg": b"b"}
    with pytest.raises(ShardError, match=r"1 of 2 images have a label, and .*a\.tar/2\.jpg has none"):
        index_of(tmp_path, some)
    assert index_of(tmp_path, {"1.jpg": b"a", "2.jpg": b"b"}).labels is None


def test_class_names_come_from_a_file_that_fits(tmp_path: Path) -> None:
    members = {"1.jpg": b"a", "1.cls": b"2"}
    assert index_of(tmp_path, members).class_names == ("0", "1", "2")
    (tmp_path / "classes.txt").write_text("cat\ndog\n")
    with pytest.raises(ShardError, match=r"classes\.txt names 2 classes, and an image has the label 2"):
        index_of(tmp_path, members)
    (tmp_path / "classes.txt").write_text("cat\ndog\nowl\n")
    assert index_of(tmp_path, members).class_names == ("cat", "dog", "owl")


def test_shards_without_images_and_shards_given_twice(tmp_path: Path) -> None:
    with pytest.raises(ShardError, match="no images in 1 shard"):
        index_of(tmp_path, {"1.txt": b"a"})
    with pytest.raises(ShardError, match=r"a\.tar was given twice"):
        index_shards([str(tmp_path / "a.tar")] * 2)
