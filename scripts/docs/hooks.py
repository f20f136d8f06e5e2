"""What mkdocs puts into pages when it builds the site: settings, commands, the page of the kernels."""

import re
from pathlib import Path
from typing import Any

from scripts.docs import commands, settings

ROOT = Path(__file__).resolve().parents[2]


def on_page_markdown(markdown: str, **_: Any) -> str:
    """An event of mkdocs: the text of a page, with what its markers stand for."""
    for marker, make in MADE.items():
        if marker in markdown:
            markdown = markdown.replace(marker, make())
    return markdown


def kernels_page() -> str:
    """kernels/README.md without its title; what it links to in the repository is named instead."""
    text = (ROOT / "kernels/README.md").read_text(encoding="utf-8")
    body = text.partition("\n")[2]
    body = re.sub(r"\]\(\.\./docs/([^)]+)\)", r"](\1)", body)
    return re.sub(r"\[([^\]]+)\]\(\.\./([^)]+)\)", r"\1 in `\2`", body)


MADE = {
    "<!-- settings -->": settings.page,
    "<!-- commands -->": commands.page,
    "<!-- kernels/README.md -->": kernels_page,
}
