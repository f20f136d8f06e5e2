"""Our writer of safetensors files, held to the library's reader; and what is not read."""

import hashlib
import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load, load_file, save, save_file
from torch import Tensor

from fastjepa.engine.checkpoints.tensorfile import (
    HashedFile,
    TensorFile,
    TensorFileError,
    fingerprint,
    header_of,
)

SHAPES = st.dictionaries(
    st.text(max_size=12).filter(lambda name: name != "__metadata__"),
    st.lists(st.integers(1, 5), max_size=3),
    max_size=6,
)


def some(shapes: dict[str, list[int]]) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


@given(shapes=SHAPES, cut=st.integers(1, 40))
def test_written_in_pieces_it_is_what_the_library_reads(
    tmp_path_factory: pytest.TempPathFactory, shapes: dict[str, list[int]], cut: int
) -> None:
    tensors = some(shapes)
    data = b"".join(tensor.numpy().tobytes() for tensor in tensors.values())
    path = tmp_path_factory.mktemp("tensors") / "a.safetensors"
    file = HashedFile(path)
    file.write([header_of(shapes)])
    file.write([data[begin : begin + cut] for begin in range(0, len(data), cut)])
    told = file.finish()

    content = path.read_bytes()
    assert told == (len(content), hashlib.sha256(content).hexdigest()) == fingerprint(path)
    for found in (load(content), load_file(path)):
        assert found.keys() == tensors.keys()
        assert all(torch.equal(found[name], tensors[name]) for name in tensors)
    assert (len(content) - len(data)) % 8 == 0, "the format wants its data aligned"
    mapped = TensorFile(path)
    assert mapped.shapes == {name: tuple(shape) for name, shape in shapes.items()}
    assert len(mapped) == len(shapes)
    assert all(torch.equal(mapped[name], tensors[name]) for name in tensors)


@given(shapes=SHAPES)
def test_what_the_library_writes_is_read(
    tmp_path_factory: pytest.TempPathFactory, shapes: dict[str, list[int]]
) -> None:
    tensors = some(shapes)
    path = tmp_path_factory.mktemp("tensors") / "a.safetensors"
    save_file(tensors, path)
    found = dict(TensorFile(path))
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], tensors[name]) for name in tensors)


def test_changing_what_was_read_changes_no_file(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_file({"a": torch.zeros(8)}, path)
    TensorFile(path)["a"].fill_(1)
    assert load_file(path)["a"].count_nonzero() == 0


def test_a_name_that_is_not_there(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_file({"a": torch.zeros(8)}, path)
    with pytest.raises(KeyError, match="'b'"):
        TensorFile(path)["b"]


def longer_than_its_header_says() -> bytes:
    return save({"a": torch.zeros(8)}) + b"\0" * 4


def overlapping() -> bytes:
    entry = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
    text = json.dumps({"a": entry, "b": entry}).encode()
    return len(text).to_bytes(8, "little") + text + b"\0" * 4


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "is no safetensors file"),
        (b"\xff" * 64, "is no safetensors file"),
        (save({"a": torch.zeros(8)})[:-1], "is no safetensors file"),
        (longer_than_its_header_says(), "is no safetensors file"),
        (overlapping(), "is no safetensors file"),
        (b"PK\x03\x04" + b"\0" * 64, "is a pickle, or a zip of pickles"),
        (b"\x80\x04" + b"\0" * 64, "is a pickle, or a zip of pickles"),
        (save({"a.b": torch.zeros(8, dtype=torch.float64)}), "a.b is of dtype F64, expected F32"),
    ],
)  # fmt: skip
def test_what_is_no_such_file_is_refused(tmp_path: Path, content: bytes, said: str) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(content)
    with pytest.raises(TensorFileError, match=said) as caught:
        TensorFile(path)
    assert str(path) in str(caught.value)
