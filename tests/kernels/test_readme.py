"""The page of the kernels: its examples run as they stand, and its table has every op."""

import re
from pathlib import Path

import pytest
import torch

import fastjepa_kernels as fk

TEXT = (Path(__file__).resolve().parents[2] / "kernels" / "README.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(r"^```python\n(.*?)^```$", TEXT, flags=re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("number", range(len(EXAMPLES)))
def test_an_example_runs_as_it_stands(number: int) -> None:
    torch.manual_seed(number)
    exec(
        compile(EXAMPLES[number], f"example {number + 1} of kernels/README.md", "exec"),
        {"__name__": "readme"},
    )


def test_there_are_examples_and_every_op_is_in_the_table() -> None:
    assert len(EXAMPLES) >= 3
    ops = {name for name in dir(torch.ops.fastjepa) if not name.startswith("_")}
    public = {op for op in ops if hasattr(fk, op)}
    listed = set(re.findall(r"^\| `(\w+)\(", TEXT, flags=re.MULTILINE))
    assert public <= listed <= set(fk.__all__)
