"""The pages of the documentation, and the fenced blocks and commands in them."""

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.conftest import ROOT

PAGES = sorted(
    path.relative_to(ROOT)
    for path in (
        ROOT / "README.md",
        ROOT / "CONTRIBUTING.md",
        ROOT / "kernels" / "README.md",
        *(ROOT / "docs").rglob("*.md"),
    )
)
TUTORIAL = Path("docs/tutorial.md")
LANGUAGES = {"bash", "python", "yaml", "text"}  # text is output, or a file that nobody runs
_FENCE = re.compile(r"^( *)```([^\n]*)\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Block:
    """A fenced block of a page."""

    page: Path
    line: int
    language: str
    text: str

    @property
    def place(self) -> str:
        return f"{self.page}:{self.line}"

    def commands(self) -> Iterator[list[str]]:
        """The words of each command of a bash block, without comments."""
        for line in self.text.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if words:
                yield words


def blocks_of(page: Path, *languages: str) -> list[Block]:
    """The blocks of a page, in order: all of them, or those in these languages."""
    text = (ROOT / page).read_text(encoding="utf-8")
    found = [
        Block(page, text.count("\n", 0, match.start()) + 1, match[2], match[3])
        for match in _FENCE.finditer(text)
    ]
    return [block for block in found if not languages or block.language in languages]


def prose(page: Path) -> str:
    """A page without its blocks."""
    return _FENCE.sub("", (ROOT / page).read_text(encoding="utf-8"))
