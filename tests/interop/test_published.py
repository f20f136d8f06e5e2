import argparse
import io
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

from fastjepa.interop.published import read_published

WEIGHTS = {"a": torch.arange(300.0)}


class RunsOnUnpickling:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.marker),)


@pytest.mark.parametrize("layout", ["zip", "legacy", "plain pickle"])
@pytest.mark.parametrize("inside", ["an entry", "the arguments", "a state dict"])
def test_a_malicious_pickle_is_refused_and_not_run(layout: str, inside: str, tmp_path: Path) -> None:
    bomb = RunsOnUnpickling(tmp_path / "was run")
    content = {
        "an entry": {"epoch": bomb, "model": WEIGHTS},
        "the arguments": {"args": argparse.Namespace(lr=bomb), "model": WEIGHTS},
        "a state dict": {"model": {"a": bomb}},
    }[inside]
    path = tmp_path / "file.pth"
    if layout == "plain pickle":
        path.write_bytes(pickle.dumps(content, protocol=2))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=layout == "zip")
    with pytest.raises(
        ValueError, match="which could run code; only tensors and numbers are read"
    ) as refusal:
        read_published(path)
    assert "mkdir" in str(refusal.value)
    assert "weights_only" not in str(refusal.value), "nobody is told how to load it all the same"
    assert not bomb.marker.exists()
    # The bomb does go off where nothing is checked.
    if layout == "plain pickle":
        pickle.loads(path.read_bytes())
    else:
        torch.load(path, weights_only=False)
    assert bomb.marker.exists()


def test_arguments_are_the_one_kind_of_object_allowed(tmp_path: Path) -> None:
    content = {"model": WEIGHTS, "args": argparse.Namespace(lr=1e-3, model="mae")}
    torch.save(content, tmp_path / "mae.pth")
    found = read_published(tmp_path / "mae.pth")
    assert found.extras == {"args": argparse.Namespace(lr=1e-3, model="mae")}
    torch.save({"model": WEIGHTS, "path": tmp_path}, tmp_path / "path.pth")
    with pytest.raises(ValueError, match="Python object, pathlib"):
        read_published(tmp_path / "path.pth")


def test_prefixes_are_taken_off_and_the_rest_is_kept(tmp_path: Path) -> None:
    networks = {name: {"module.x": torch.ones(2)} for name in ("encoder", "predictor", "target_encoder")}
    torch.save({**networks, "epoch": 3}, tmp_path / "file")
    found = read_published(tmp_path / "file")
    assert found.states.keys() == networks.keys()
    assert all(state.keys() == {"x"} for state in found.states.values())
    assert found.extras == {"epoch": 3}


def damaged_files() -> dict[str, bytes]:
    whole, legacy = io.BytesIO(), io.BytesIO()
    torch.save({"model": WEIGHTS}, whole)
    torch.save({"model": WEIGHTS}, legacy, _use_new_zipfile_serialization=False)
    return {
        "empty": b"",
        "text": b"hello world\n",
        "half a zip": whole.getvalue()[: len(whole.getvalue()) // 2],
        "a start of a zip": b"PK\x03\x04junk",
        "half a legacy file": legacy.getvalue()[: len(legacy.getvalue()) // 2],
        "a legacy file without its end": legacy.getvalue()[:-100],
        "no more than a pickle header": b"\x80\x02",
    }


@pytest.mark.parametrize("kind", damaged_files())
def test_damaged_files_are_called_so(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "file.pth"
    path.write_bytes(damaged_files()[kind])
    with pytest.raises(
        ValueError, match=r"file\.pth was not loaded: it is damaged, or was not written by torch"
    ):
        read_published(path)


def test_files_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"cannot read .*nothing\.pth: No such file"):
        read_published(tmp_path / "nothing.pth")
    with pytest.raises(ValueError, match=r"cannot read .*: Is a directory"):
        read_published(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([1, 2], "holds a list, not a dictionary"),
        (torch.zeros(3), "holds a Tensor, not a dictionary"),
        ({}, "it holds nothing"),
        ({"encoder": WEIGHTS, "predictor": WEIGHTS}, "it holds encoder, predictor$"),
        ({"state_dict": WEIGHTS}, "neither a published I-JEPA checkpoint .* it holds state_dict"),
        ({"model": {"a": 3}}, "neither"),
        ({"model": {0: torch.zeros(3)}}, "neither"),
        ({"model": torch.zeros(3)}, "neither"),
    ],
)
def test_other_layouts_are_refused(content: Any, message: str, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "file.pth")
    with pytest.raises(ValueError, match=message):
        read_published(tmp_path / "file.pth")
