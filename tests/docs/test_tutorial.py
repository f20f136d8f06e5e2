"""The tutorial from top to bottom, as a reader goes through it; only the training is shorter."""

from pathlib import Path
from typing import Any

import pytest

from fastjepa import train as trainer
from tests.conftest import ROOT
from tests.docs.blocks import TUTORIAL, blocks_of
from tests.docs.running import run_command, write_file
from tests.docs.test_python import run_python

# Laid over its training: its own model and images, and two steps of 64 images in place of 2,000.
SHORTER = ["optim.steps=2", "optim.warmup_epochs=0", "probe.final_bank=200", "probe.final_queries=100"]


@pytest.mark.slow
def test_the_tutorial_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    names: dict[str, Any] = {}
    for block in blocks_of(TUTORIAL, "bash", "python", "yaml"):
        if block.language == "yaml":
            write_file(block, tmp_path)
        elif block.language == "python":
            run_python(block, names)
        else:
            for words in block.commands():
                if words[:2] == ["fastjepa", "train"]:
                    assert trainer.main([*words[2:], *SHORTER]) == 0, block.place
                else:
                    assert words[0] == "fastjepa", block.place
                    run_command(words)
    assert names["logits"].shape == (500, 10)
