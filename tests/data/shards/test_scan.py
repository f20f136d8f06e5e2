import gzip
from io import BytesIO
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastjepa.data.shards.scan import Found, ShardError, scan_shard
from tests.data.pictures import write_shard

KEYS = st.text("abcxyz0123/_-", min_size=1, max_size=120).filter(
    lambda key: not key.startswith("/") and not key.endswith("/") and "//" not in key
)
CONTENTS = st.binary(max_size=2000)


def scan(path: Path, with_labels: bool = True) -> Found:
    with path.open("rb") as stream:
        return scan_shard(stream, str(path), path.stat().st_size, with_labels)


@settings(max_examples=40)
@given(members=st.dictionaries(KEYS, st.tuples(CONTENTS, st.integers(0, 999)), min_size=1, max_size=8))
def test_every_image_is_where_it_is_said_to_be(
    tmp_path_factory: pytest.TempPathFactory, members: dict[str, tuple[bytes, int]]
) -> None:
    path = tmp_path_factory.mktemp("scan") / "a.tar"
    written: dict[str, bytes] = {}
    for key, (content, label) in members.items():
        written |= {f"{key}.jpg": content, f"{key}.cls": str(label).encode()}
    found, whole = scan(write_shard(path, written)), path.read_bytes()
    assert found.names == [f"{key}.jpg" for key in members]
    assert found.labels == [label for _, label in members.values()]
    pieces = [whole[at : at + size] for at, size in zip(found.offsets, found.sizes, strict=True)]
    assert pieces == [content for content, _ in members.values()]


def test_members_of_one_key_are_one_sample(tmp_path: Path) -> None:
    found = scan(
        write_shard(
            tmp_path / "a.tar",
            {
                "1.cls": b"7\n",  # before its image
                "1.left.JPG": b"a",
                "1.right.png": b"bc",
                "2.jpg": b"d",
                "2.json": b'{"label": 3, "text": "x"}',
                "dir.v1/3.jpeg": b"e",  # a dot in a folder ends no key
                "dir.v1/3.cls": b"0",
                "4.txt": b"no image",
            },
        )
    )
    assert found.names == ["1.left.JPG", "1.right.png", "2.jpg", "dir.v1/3.jpeg"]
    assert found.labels == [7, 7, 3, 0]
    assert found.without_image == 1


@pytest.mark.parametrize("name", ["1.cls", "1.json"])
def test_labels_can_be_left_alone(tmp_path: Path, name: str) -> None:
    path = write_shard(tmp_path / "a.tar", {"1.jpg": b"a", name: b"not one"})
    with pytest.raises(ShardError, match=rf"a\.tar/{name}.*--no-labels"):
        scan(path)
    assert scan(path, with_labels=False).labels == [None]


@pytest.mark.parametrize("label", ["-1", "1.5", "true", '"cat"'])
def test_a_json_label_must_be_the_number_of_a_class(tmp_path: Path, label: str) -> None:
    path = write_shard(tmp_path / "a.tar", {"1.jpg": b"a", "1.json": f'{{"label": {label}}}'.encode()})
    with pytest.raises(ShardError, match="it must be the number of a class"):
        scan(path)


@settings(max_examples=60)
@given(data=st.data())
def test_wherever_a_shard_is_cut_off_it_is_refused_or_whole(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    path = tmp_path_factory.mktemp("cut") / "a.tar"
    whole = write_shard(path, {"1.jpg": bytes(700), "2.jpg": b"b" * 300}).read_bytes()
    end = (512 + 1024) + (512 + 512)  # of the last member; then come blocks of zeros
    length = data.draw(st.integers(0, len(whole)))
    path.write_bytes(whole[:length])
    if length >= end + 512:
        assert scan(path).names == ["1.jpg", "2.jpg"]
        return
    with pytest.raises(ShardError, match=r"a\.tar (is truncated|cannot be read as a tar file)"):
        scan(path)


def test_compressed_shards_are_refused(tmp_path: Path) -> None:
    whole = write_shard(tmp_path / "a.tar", {"1.jpg": b"a"}).read_bytes()
    packed = gzip.compress(whole)
    with pytest.raises(ShardError, match=r"b\.tar\.gz cannot be read.*must not be compressed"):
        scan_shard(BytesIO(packed), "b.tar.gz", len(packed))


def test_damage_in_the_middle_is_refused(tmp_path: Path) -> None:
    path = write_shard(tmp_path / "a.tar", {"1.jpg": b"a", "2.jpg": b"b"})
    whole = bytearray(path.read_bytes())
    whole[1024 + 20] ^= 0xFF  # in the second header
    path.write_bytes(whole)
    with pytest.raises(ShardError, match="truncated or damaged at byte 1,024"):
        scan(path)


def test_what_macos_puts_beside_every_file_is_no_image(tmp_path: Path) -> None:
    names = "._a.jpg", "a.jpg", "._a.cls", "a.cls", "b/._c.jpg", "b/c.jpg", "b/c.cls"
    shard = write_shard(tmp_path / "a.tar", dict.fromkeys(names, b"1"))
    found = scan(shard)
    assert (found.names, found.labels) == (["a.jpg", "b/c.jpg"], [1, 1])
