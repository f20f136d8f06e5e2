"""Every Python block of the documentation runs, those of a page one after another."""

from pathlib import Path
from typing import Any

import pytest

from tests.docs.blocks import PAGES, TUTORIAL, Block, blocks_of
from tests.docs.rules import stand_in

# What the blocks of a page take for granted. Anything else that they name they have to make.
PREAMBLES = {
    "README.md": """
import timm
import torch
from torch import nn

images = torch.randint(256, (2, 3, 28, 28), dtype=torch.uint8)
context_index = torch.rand(2, 49).argsort(1)[:, :12]
target_index = torch.rand(4, 2, 49).argsort(2)[:, :, :9]
x, kept, positions = torch.randn(2, 49, 32), context_index, torch.randn(49, 32)
model = timm.create_model("vit_tiny_patch16_224", depth=1)
prediction, hidden, targets = torch.randn(4, 2, 9, 32), torch.randn(2, 49, 32), target_index
norm, student = nn.LayerNorm(32), nn.Linear(32, 32)
""",
    "docs/index.md": """
import torch

x, index = torch.randn(2, 9, 8), torch.tensor([[0, 3], [8, 8]])
""",
}

# Blocks that are only compiled, by how they begin, and why.
SKETCHES = {
    "hidden = target_encoder(images)": "many ranks in ten lines; engine/learner.py is the code",
}


def with_python() -> list[Path]:
    return [page for page in PAGES if page != TUTORIAL and blocks_of(page, "python")]


@pytest.mark.parametrize("page", with_python(), ids=str)
def test_python_runs(page: Path, here: Path) -> None:
    names: dict[str, Any] = {}
    exec(compile(PREAMBLES.get(str(page), ""), f"preamble of {page}", "exec"), names)
    for block in blocks_of(page, "python"):
        run_python(block, names)


def run_python(block: Block, names: dict[str, Any]) -> None:
    """Execute a block where its lines are those of the page."""
    text = "".join(
        '"'.join(stand_in(part) for part in line.split('"')) for line in block.text.splitlines(keepends=True)
    )
    code = compile("\n" * block.line + text, str(block.page), "exec")
    if not any(block.text.startswith(beginning) for beginning in SKETCHES):
        exec(code, names)


def test_a_block_that_is_wrong_fails() -> None:
    with pytest.raises(ImportError):
        run_python(Block(Path("docs/none.md"), 1, "python", "from fastjepa.interop import to_jax\n"), {})
