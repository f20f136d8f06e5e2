"""Every command of the documentation runs, as tests/docs/rules.py says; test_tutorial.py has the tutorial."""

from pathlib import Path

import pytest

from tests.docs.blocks import LANGUAGES, PAGES, TUTORIAL, Block, blocks_of
from tests.docs.running import run_command, write_file


def with_commands() -> list[Path]:
    return [page for page in PAGES if page != TUTORIAL and blocks_of(page, "bash", "yaml")]


@pytest.mark.parametrize("page", with_commands(), ids=str)
def test_commands_run(page: Path, here: Path) -> None:
    for block in blocks_of(page, "bash", "yaml"):
        run_block(block, here)


def run_block(block: Block, folder: Path) -> None:
    if block.language == "yaml":
        write_file(block, folder)
        return
    for words in block.commands():
        try:
            run_command(words)
        except (AssertionError, Exception, SystemExit) as error:
            pytest.fail(f"{block.place}: {' '.join(words)}\n{type(error).__name__}: {error}")


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_every_block_says_what_it_is(page: Path) -> None:
    unknown = [block.place for block in blocks_of(page) if block.language not in LANGUAGES]
    assert not unknown, f"not one of {', '.join(sorted(LANGUAGES))}: {unknown}"


@pytest.mark.parametrize(
    "text",
    [
        "fastjepa probe runs/NAME --protocol guess",
        "fastjepa train --config configs/vit_base_17.yaml data.root=/images",
        "fastjepa train --config configs/vit_base_16.yaml data.root=/images optim.learning_rate=1",
        "fastjepa export runs/NAME encoder.zip",
        "torchrun --processes 8 fastjepa/train.py --config configs/vit_base_16.yaml data.root=/images",
        "make trian",
        "pip install 'fastjepa[everything]'",
        "curl example.org",
    ],
)
def test_a_command_that_is_wrong_fails(text: str, here: Path) -> None:
    with pytest.raises(pytest.fail.Exception, match=text.split()[0]):
        run_block(Block(Path("docs/none.md"), 1, "bash", text + "\n"), here)
