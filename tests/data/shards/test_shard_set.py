"""Shards as a set: the images of the folder, from a drive and over HTTP; what is said when they change."""

import os
import pickle
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch

from fastjepa.data.folder import ImageFolder
from fastjepa.data.packing.encode import Packing
from fastjepa.data.packing.pack import pack
from fastjepa.data.shards import store
from fastjepa.data.shards.build import index_shards
from fastjepa.data.shards.index import INDEX_NAME, IndexFileError, write_index
from fastjepa.data.shards.shard_set import ShardSet
from fastjepa.data.shards.store import RangeReader, StoreError
from fastjepa.data.transforms import Augmentation
from fastjepa.data.unreadable import UnreadableImage
from fastjepa.data.views import read_views
from tests.data.pictures import write_photos
from tests.data.ranges import served

COPIES = Packing(copy_small=True, in_order=True, shard_bytes=40_000)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_photos(tmp_path_factory.mktemp("photos") / "images", 40)


@pytest.fixture
def shards(folder: Path, tmp_path: Path) -> Path:
    report = pack(folder, tmp_path / "shards", COPIES)
    assert report.shards > 3
    return tmp_path / "shards"


def assert_same(packed: ShardSet, folder: Path) -> None:
    images = ImageFolder(folder)
    assert len(packed) == len(images)
    assert packed.class_names == images.class_names
    assert packed.labels is not None
    assert images.labels is not None
    assert torch.equal(packed.labels, images.labels)
    crops = Augmentation(crop_scale=(0.3, 1.0), flip_probability=0.5)
    index = [0, 39, 17, 20, 5]
    ours, theirs = (read_views(images, index, 24, crops, seed=1, epoch=2) for images in (packed, images))
    assert torch.equal(ours.pixels, theirs.pixels)
    assert [packed.encoded(i) for i in range(40)] == [images.encoded(i) for i in range(40)]


def test_the_same_images_as_in_the_folder(folder: Path, shards: Path) -> None:
    packed = ShardSet(shards)
    assert_same(packed, folder)
    assert packed.path(0) == f"{shards}/shard-000000.tar/00000000.jpg"
    assert packed.shard_ends[-1] == 40
    assert_same(pickle.loads(pickle.dumps(packed)), folder)  # what a process that is not forked gets


def test_over_http_by_ranges(folder: Path, shards: Path) -> None:
    with served(shards) as (url, ranges):
        packed = ShardSet(url)
        assert_same(packed, folder)
        assert packed.path(39).startswith(f"{url}/shard-")
        local = ShardSet(shards)
        asked = {(name, end - begin) for name, begin, end in ranges}
        assert {(Path(local.path(i)).parent.name, len(local.encoded(i))) for i in range(40)} <= asked


def test_shards_are_indexed_over_http(shards: Path, tmp_path: Path, folder: Path) -> None:
    with served(shards) as (url, _):
        names = sorted(path.name for path in shards.glob("*.tar"))
        index = index_shards([f"{url}/{name}" for name in names])
        assert all(stamp.mark.startswith("ETag") for stamp in index.stamps)
        write_index(index, tmp_path / INDEX_NAME)
        packed = ShardSet(tmp_path)
        assert [packed.encoded(i) for i in range(40)] == [ImageFolder(folder).encoded(i) for i in range(40)]
        os.utime(shards / names[1])
        with pytest.raises(
            IndexFileError, match=rf"{names[1]} was changed after it was indexed.*its ETag is"
        ):
            ShardSet(tmp_path)


def test_a_changed_or_missing_shard_is_refused_by_name(shards: Path) -> None:
    second = shards / "shard-000001.tar"
    content, status = second.read_bytes(), second.stat()
    second.write_bytes(content + bytes(512))
    with pytest.raises(
        IndexFileError, match=r"shard-000001\.tar was changed .*bytes and had.*data index --force"
    ):
        ShardSet(shards)
    second.write_bytes(content)
    with pytest.raises(IndexFileError, match=r"shard-000001\.tar was changed .*its mtime is another"):
        ShardSet(shards)
    os.utime(second, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert len(ShardSet(shards)) == 40
    second.unlink()
    with pytest.raises(StoreError, match=r"cannot read the shard .*shard-000001\.tar: No such file"):
        ShardSet(shards)


def test_a_shard_cut_off_under_a_run_costs_its_images_not_the_run(shards: Path) -> None:
    packed = ShardSet(shards)
    os.truncate(shards / "shard-000000.tar", 600)
    with pytest.raises(UnreadableImage, match=r"shard-000000\.tar/00000000\.jpg: 88 of its"):
        packed.encoded(0)
    assert packed.encoded(39)


def test_a_store_that_does_not_answer_ends_the_run_with_its_name(
    shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store, "_PAUSES_S", (0.0, 0.0))
    with served(shards) as (url, _):
        packed = ShardSet(url)
        packed.encoded(0)
    with pytest.raises(StoreError, match=rf"cannot read {url}/shard-000000\.tar, tried 3 times"):
        packed.encoded(1)


def test_missing_and_unknown_urls(tmp_path: Path) -> None:
    with (
        served(tmp_path) as (url, _),
        pytest.raises(IndexFileError, match=f"there is no {url}/index.safeten"),
    ):
        ShardSet(url)
    with pytest.raises(IndexFileError, match="cannot open nonsense://x"):
        ShardSet("nonsense://x")


def test_only_so_many_files_are_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "_OPEN_FILES", 3)
    for number in range(9):
        (tmp_path / str(number)).write_bytes(bytes([number] * 4))
    reader = RangeReader()
    before = len(os.listdir("/proc/self/fd"))
    for number in [*range(9), 0, 8, 4]:
        assert reader.read(str(tmp_path / str(number)), 1, 2) == bytes([number] * 2)
        assert len(os.listdir("/proc/self/fd")) <= before + 3
    reader.close()
    assert len(os.listdir("/proc/self/fd")) == before


def test_webdataset_reads_what_we_pack(folder: Path, shards: Path) -> None:
    webdataset = pytest.importorskip("webdataset")
    urls = sorted(map(str, shards.glob("*.tar")))
    samples = list(webdataset.WebDataset(urls, shardshuffle=False))
    images = ImageFolder(folder)
    assert [sample["jpg"] for sample in samples] == [images.encoded(i) for i in range(40)]
    assert images.labels is not None
    assert [int(sample["cls"]) for sample in samples] == images.labels.tolist()


def test_a_server_that_knows_no_ranges_is_named(shards: Path, tmp_path: Path) -> None:
    class Handler(SimpleHTTPRequestHandler):
        def log_message(self, *args: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(shards))) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        thread.start()
        try:
            url = f"http://127.0.0.1:{server.server_port}/{next(shards.glob('*.tar')).name}"
            with pytest.raises(
                StoreError, match=r"bytes came where 9 were asked for\. Its server knows no range"
            ):
                RangeReader().read(url, 512, 9)
        finally:
            server.shutdown()
            thread.join()
