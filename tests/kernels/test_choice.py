"""Which implementation runs, and that the package works where there is no Triton."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import fastjepa_kernels as fk
from fastjepa_kernels import choice
from fastjepa_kernels.choice import Measured, Way, Ways, fastest, parse_table, table_name

CPU = torch.device("cpu")
OPS = ["gather_tokens", "patchify_gather", "packed_attention", "jepa_loss", "ema_update_"]


@pytest.fixture
def ways() -> Iterator[Ways]:
    """An op of three ways: what sdpa is called with says whether it takes it; varlen is not for the CPU."""
    yield Ways(
        "an_op",
        Way("varlen", lambda x: "varlen"),
        Way("sdpa", lambda x: "sdpa", takes=lambda x: x > 0),
        Way("torch", lambda x: "torch"),
        size=lambda x: (abs(x),),
    )
    del choice._OPS["an_op"]
    choice._fastest_on.cache_clear()


@pytest.mark.parametrize("op", OPS)
def test_every_op_has_its_implementations(op: str) -> None:
    names = fk.implementations(op)
    assert "torch" in names
    assert fk.implementations(op, "cpu") == fk.implementations(op, torch.device("cpu"))
    assert "varlen" not in fk.implementations(op, "cpu")
    # Under the interpreter Triton is there, and last.
    assert fk.implementations(op, "cpu")[-1] == "triton"
    assert fk.implementations(op, "cuda")[0] == "triton"


def test_the_first_that_takes_the_arguments_runs(ways: Ways) -> None:
    assert fk.implementations("an_op", "cpu") == ["sdpa", "torch"]
    assert ways("", CPU, 1) == "sdpa"
    assert ways("", CPU, -1) == "torch"


def test_a_preference_is_met_where_it_can_be(ways: Ways) -> None:
    assert ways("torch", CPU, 1) == "torch"
    assert ways("varlen", CPU, 1) == "sdpa"
    with fk.use("sdpa"):
        assert ways(choice.preference(), CPU, -1) == "torch"
        with fk.use("torch"):
            assert ways(choice.preference(), CPU, 1) == "torch"
        assert ways(choice.preference(), CPU, 1) == "sdpa"
    assert choice.preference() == ""


def test_a_strict_preference_is_met_or_refused(ways: Ways) -> None:
    with fk.use("sdpa", strict=True):
        assert ways(choice.preference(), CPU, 1) == "sdpa"
        with pytest.raises(ValueError, match=r"an_op cannot run as .sdpa. with these .*it can as torch"):
            ways(choice.preference(), CPU, -1)
    with fk.use("varlen", strict=True), pytest.raises(ValueError, match="cannot run as 'varlen'"):
        ways(choice.preference(), CPU, 1)


def test_a_strict_preference_reaches_the_gradient() -> None:
    x = torch.randn(1, 3, 4, dtype=torch.float64, requires_grad=True)
    with (
        fk.use("triton", strict=True),
        pytest.raises(ValueError, match="gather_tokens cannot run as 'triton'"),
    ):
        fk.gather_tokens(x, torch.tensor([[0]]))


@pytest.fixture
def gradient() -> Iterator[Ways]:
    """Of an op that has sdpa for its forward pass alone, and varlen on other devices."""
    yield Ways("an_op_backward", Way("varlen", lambda x: "varlen"), Way("torch", lambda x: "torch"))
    del choice._OPS["an_op_backward"]


def test_a_gradient_without_that_implementation_follows_a_strict_preference(gradient: Ways) -> None:
    with fk.use("sdpa", strict=True):
        assert gradient(choice.preference(), CPU, 1) == "torch"
    with fk.use("varlen", strict=True), pytest.raises(ValueError, match="an_op_backward cannot run as"):
        gradient(choice.preference(), CPU, 1)


def test_a_preference_holds_where_torch_compile_traces_it() -> None:
    def take(x: Tensor, index: Tensor) -> Tensor:
        with fk.use("varlen", strict=True):
            return fk.gather_tokens(x, index)

    compiled = torch.compile(take, fullgraph=True, backend="aot_eager")
    with pytest.raises(ValueError, match="gather_tokens cannot run as 'varlen'"):
        compiled(torch.randn(1, 3, 4), torch.tensor([[0]]))
    assert choice.preference() == ""


def test_only_what_a_choice_goes_by_is_looked_at() -> None:
    def fail(*_args: Any) -> Any:
        raise AssertionError("looked at")

    ways = Ways(
        "an_op", Way("sdpa", lambda x: "sdpa"), Way("torch", lambda x: "torch", takes=fail), size=fail
    )
    try:
        assert ways("", CPU, 1) == "sdpa"
        assert ways("sdpa", CPU, 1) == "sdpa"
    finally:
        del choice._OPS["an_op"]


def test_the_preference_ends_with_an_error() -> None:
    with pytest.raises(RuntimeError, match="inside"), fk.use("torch"):
        raise RuntimeError("inside")
    assert choice.preference() == ""


def test_unknown_names_are_refused() -> None:
    with pytest.raises(ValueError, match="no implementation is called 'cutlass'; there are triton, cuda"):
        fk.use("cutlass").__enter__()
    with pytest.raises(ValueError, match=r"no op is called 'gather'; there are .*gather_tokens"):
        fk.implementations("gather")


def test_the_environment_sets_the_preference() -> None:
    code = "import fastjepa_kernels as fk; print(fk.choice.preference())"

    def run(name: str) -> subprocess.CompletedProcess[str]:
        environment = os.environ | {"FASTJEPA_KERNELS": name}
        return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)

    assert run("torch").stdout == "torch\n"
    assert "FASTJEPA_KERNELS=cutlass: it must be one of triton, cuda, cpp, torch" in run("cutlass").stderr


def test_a_table_decides_where_nobody_asks(ways: Ways, monkeypatch: pytest.MonkeyPatch) -> None:
    text = json.dumps(
        {"ops": {"an_op": [{"size": [2], "fastest": "torch"}, {"size": [64], "fastest": "sdpa"}]}}
    )
    monkeypatch.setattr(choice, "_table", lambda device: parse_table(text))
    choice._fastest_on.cache_clear()
    assert ways("", CPU, 1) == "torch"
    assert ways("", CPU, 100) == "sdpa"
    assert ways("sdpa", CPU, 1) == "sdpa"
    assert ways("", CPU, -100) == "torch"  # the fastest does not take it


@given(st.lists(st.tuples(st.integers(0, 4096), st.integers(1, 128)), min_size=1, unique=True), st.data())
def test_a_measured_size_finds_its_own_row(sizes: list[tuple[int, ...]], data: st.DataObject) -> None:
    table = tuple(Measured(size, f"way {i}") for i, size in enumerate(sizes))
    wanted = data.draw(st.sampled_from(table))
    assert fastest(table, wanted.size) == wanted.fastest


def test_without_a_row_nothing_is_named() -> None:
    assert fastest((), (1, 2)) == ""
    assert table_name("NVIDIA H200") == "nvidia_h200.json"


def test_the_tables_that_are_shipped_name_ops_and_implementations_that_exist() -> None:
    for path in (Path(choice.__file__).parent / "tables").glob("*.json"):
        for op, rows in parse_table(path.read_text()).items():
            known = {way.name for way in choice._OPS[op].ways}
            assert {row.fastest for row in rows} <= known, path


WITHOUT_TRITON = """
import sys
sys.modules["triton"] = None  # importing it raises
import torch
import fastjepa_kernels as fk

x = torch.randn(2, 5, 8, requires_grad=True)
fk.gather_tokens(x, torch.tensor([[0, 3], [1, 1]])).sum().backward()
assert x.grad[1, 1, 0] == 2
for op in ("gather_tokens", "packed_attention", "ema_update_"):
    assert "triton" not in fk.implementations(op, "cuda") + fk.implementations(op, "cpu")
"""


def test_it_works_without_triton() -> None:
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_TRITON], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
