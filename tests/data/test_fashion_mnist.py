import gzip
import hashlib
import pickle
import re
from pathlib import Path
from typing import Any, Literal

import pytest
import torch

from fastjepa.data import fashion_mnist
from fastjepa.data.fashion_mnist import FashionMNIST, read_idx

EMBEDDED = Path(fashion_mnist.__file__).parent


def idx(shape: tuple[int, ...], data: bytes) -> bytes:
    return bytes((0, 0, 8, len(shape))) + b"".join(size.to_bytes(4, "big") for size in shape) + data


def write_set(folder: Path, images: int = 3, labels: bytes = b"\x00\x05\x09") -> None:
    pixels = bytes(i % 251 for i in range(images * 28 * 28))
    (folder / "train-images-idx3-ubyte").write_bytes(idx((images, 28, 28), pixels))
    (folder / "train-labels-idx1-ubyte.gz").write_bytes(gzip.compress(idx((len(labels),), labels)))


@pytest.mark.parametrize("split", ["train", "test"])
def test_the_embedded_subset_is_ten_thousand_labelled_images(split: Literal["train", "test"]) -> None:
    data = FashionMNIST(split=split)
    assert len(data) == 10_000
    assert data.images.shape == (10_000, 1, 28, 28)
    assert data.images.dtype == torch.uint8
    assert data.labels.dtype == torch.int64
    assert len(data.class_names) == 10
    assert data.labels.bincount(minlength=10).min() > 900
    assert 0.2 < data.images.float().mean() / 255 < 0.35  # published mean: 0.286


def test_the_splits_differ() -> None:
    train, test = FashionMNIST(split="train"), FashionMNIST(split="test")
    assert not torch.equal(train.labels, test.labels)


def test_the_embedded_files_are_small_and_those_the_readme_names() -> None:
    files = sorted(EMBEDDED.glob("*.gz"))
    assert sum(file.stat().st_size for file in files) <= 9_000_000
    rows = re.findall(r"^\| `([^`]+)` .*`([0-9a-f]{64})`", (EMBEDDED / "README.md").read_text(), re.M)
    assert dict(rows) == {f.name: hashlib.sha256(gzip.decompress(f.read_bytes())).hexdigest() for f in files}


def test_read_gives_the_pixels() -> None:
    data = FashionMNIST(split="test")
    image = data.read(7)
    assert image.mode == "L"
    assert image.tobytes() == bytes(data.images[7].flatten().tolist())
    assert data.path(7).endswith("t10k-images-idx3-ubyte.gz[7]")


def test_a_folder_of_original_files_packed_or_not(tmp_path: Path) -> None:
    write_set(tmp_path)
    data = FashionMNIST(tmp_path)
    assert len(data) == 3
    assert data.labels.tolist() == [0, 5, 9]
    assert data.images[0, 0, 0, :3].tolist() == [0, 1, 2]


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    write_set(tmp_path)
    with pytest.raises(
        FileNotFoundError, match=r"neither t10k-images-idx3-ubyte\.gz nor t10k-images-idx3-ubyte"
    ):
        FashionMNIST(tmp_path, split="test")


def test_an_unknown_split_is_refused() -> None:
    with pytest.raises(ValueError, match="'val'"):
        FashionMNIST(split="val")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("labels", "message"),
    [(b"\x00\x01", "2 labels for 3 images"), (b"\x00\x01\x0a", "label 10, expected 0 to 9")],
)
def test_labels_that_do_not_fit_are_refused(tmp_path: Path, labels: bytes, message: str) -> None:
    write_set(tmp_path, labels=labels)
    with pytest.raises(ValueError, match=message):
        FashionMNIST(tmp_path)


def test_images_of_another_size_are_refused(tmp_path: Path) -> None:
    write_set(tmp_path)
    (tmp_path / "train-images-idx3-ubyte").write_bytes(idx((3, 2, 2), bytes(12)))
    with pytest.raises(ValueError, match="expected 28 x 28"):
        FashionMNIST(tmp_path)


GOOD = idx((4,), b"\x00\x01\x02\x03")
PACKED = gzip.compress(GOOD, mtime=0)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("labels", b"", "expected 00 00 08 01"),
        ("labels", idx((4, 1), b"abcd"), "starts with 00 00 08 02"),
        ("labels", bytes((0, 0, 13, 1)) + GOOD[4:], "starts with 00 00 0d 01"),  # float32
        ("labels", GOOD[:6], "ends inside its header"),
        ("labels", GOOD[:-1], "holds 3, fewer bytes than the 4"),
        ("labels", GOOD + b"x", "holds more bytes than the 4"),
        ("labels", idx((2**32 - 1,), b""), "promises 4294967295 bytes"),
        ("labels", idx((0,), b""), "promises 0 bytes"),
        ("labels.gz", PACKED[:-9], "broken or truncated gzip"),
        ("labels.gz", PACKED[:-8] + bytes(4) + PACKED[-4:], "broken or truncated gzip"),
        ("labels.gz", GOOD, "broken or truncated gzip"),
    ],
)
def test_a_damaged_file_is_refused_and_named(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as refusal:
        read_idx(path, 1)
    assert str(path) in str(refusal.value)


class Malicious:
    def __reduce__(self) -> tuple[Any, ...]:
        return (Path("touched").touch, ())


def test_a_pickle_is_refused_and_never_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "labels"
    path.write_bytes(pickle.dumps(Malicious()))
    with pytest.raises(ValueError, match="expected 00 00 08 01"):
        read_idx(path, 1)
    assert not (tmp_path / "touched").exists()
