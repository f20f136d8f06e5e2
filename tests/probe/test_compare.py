import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fastjepa.probe.compare import compare, notes
from fastjepa.probe.results import Result, find_results, read_result, row_of, write_result
from fastjepa.probe.subjects import ProbeError

DATA = {"fingerprint": "a", "classes": ["bag", "boot"]}
SETTINGS = {"seed": 0, "splits": 3, "fractions": [0.01], "blocks": 4}


def correct(accuracy: float, *shape: int, seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < accuracy


def result(
    accuracy: float,
    data: dict[str, Any] = DATA,
    settings: dict[str, Any] = SETTINGS,
    images: int = 800,
    protocols: tuple[str, ...] = ("knn", "low-shot"),
    seed: int = 0,
) -> Result:
    rows = {
        "knn": row_of(
            "target encoder", "knn", "k=10", correct(accuracy, images, seed=seed), {"temperature": 0.07}
        ),
        "low-shot": row_of("target encoder", "low-shot", "1%", correct(accuracy, 3, images, seed=seed), {}),
    }
    of_pixels = row_of("raw pixels", "knn", "k=10", correct(0.1, images), {})
    return Result("target", {}, data, settings, [*(rows[name] for name in protocols), of_pixels])


@given(st.integers(1, 40).flatmap(lambda m: st.lists(st.booleans(), min_size=m, max_size=m)))
def test_which_images_were_right_comes_back(bits: list[bool]) -> None:
    row = row_of("x", "knn", "k=1", torch.tensor(bits), {})
    assert row.right()[0].tolist() == bits
    assert row.accuracy == pytest.approx(sum(bits) / len(bits))
    drawn = row_of("x", "low-shot", "1%", torch.tensor([bits, bits[::-1]]), {})
    assert drawn.right().tolist() == [bits, bits[::-1]]


def test_a_result_comes_back_from_its_file(tmp_path: Path) -> None:
    one = result(0.7)
    write_result(tmp_path / "probe" / "5-target.json", one)
    assert read_result(tmp_path / "probe" / "5-target.json") == one
    assert [path.name for path in (tmp_path / "probe").iterdir()] == ["5-target.json"]


def test_the_test_is_the_one_that_fits() -> None:
    one, other = result(0.7), result(0.8, seed=1)
    paired = {c.first.protocol: c.difference for c in compare(one, other)}
    assert "McNemar" in paired["knn"].test
    assert "paired" in paired["low-shot"].test
    assert paired["knn"].differs
    assert paired["knn"].value == pytest.approx(other.rows[0].accuracy - one.rows[0].accuracy)
    elsewhere = result(0.8, DATA | {"fingerprint": "b"}, images=500, seed=1)
    apart = {c.first.protocol: c.difference for c in compare(one, elsewhere)}
    assert "two proportions" in apart["knn"].test
    assert "intervals" in apart["low-shot"].test
    assert any("different images" in line for line in notes(one, elsewhere))
    drawn = result(0.8, settings=SETTINGS | {"seed": 1}, seed=1)
    assert [c.difference.test.split(",")[0] for c in compare(one, drawn)] == ["McNemar", "intervals"]
    assert "other settings: seed" in notes(one, drawn)


def test_the_same_is_within_chance() -> None:
    one = result(0.7)
    assert not any(c.difference.differs or c.difference.value for c in compare(one, one))


def test_what_cannot_be_compared_is_named() -> None:
    with pytest.raises(ProbeError, match=r"other classes \(2 and 3\)"):
        compare(result(0.7), result(0.7, DATA | {"classes": ["a", "b", "c"]}))
    with pytest.raises(ProbeError, match="no protocol in common"):
        compare(result(0.7, protocols=("knn",)), result(0.7, protocols=("low-shot",)))


def test_the_newest_step_of_a_run_is_found(tmp_path: Path) -> None:
    for name in ("5-target", "30-target", "40-context"):
        write_result(tmp_path / "probe" / f"{name}.json", result(0.7))
    assert find_results(tmp_path, ("target", "context")).name == "30-target.json"
    assert find_results(tmp_path, ("context",)).name == "40-context.json"
    file = tmp_path / "probe" / "5-target.json"
    assert find_results(file, ("target",)) == file
    with pytest.raises(ProbeError, match=r"there is no result of target in .*: run fastjepa probe"):
        find_results(tmp_path / "probe", ("target",))


def test_what_is_no_result_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "x.json"
    for text, said in (
        ("not json", "is no result of fastjepa probe, or damaged"),
        ("{}", "is no result of fastjepa probe, or damaged"),
        (json.dumps({"format": 99}), "has format 99, and this version reads 1: probe again"),
        (json.dumps({"format": 1, "rows": [{}]}), "is no result of fastjepa probe, or damaged"),
    ):
        file.write_text(text)
        with pytest.raises(ProbeError, match=said):
            read_result(file)
    with pytest.raises(ProbeError, match="cannot read"):
        read_result(tmp_path)


def test_a_result_that_lacks_what_is_compared_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "x.json"
    write_result(file, result(0.7))
    whole = json.loads(file.read_text())
    without = {name: value for name, value in whole["data"].items() if name != "classes"}
    cut = [whole["rows"][0] | {"correct": whole["rows"][0]["correct"][:4]}]
    for change, said in (
        ({"data": without}, "its data say nothing of classes"),
        ({"settings": {}}, "its settings say nothing of seed"),
        ({"rows": cut}, "3 bytes are not"),
    ):
        file.write_text(json.dumps(whole | change))
        with pytest.raises(ProbeError, match=said):
            read_result(file)
