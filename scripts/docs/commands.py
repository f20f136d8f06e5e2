"""What every command says of itself under --help, as a page: it cannot say anything else than the command."""

import argparse
import contextlib
import io
import os
from collections.abc import Iterator
from unittest.mock import patch

from fastjepa import cli

_COLUMNS = "92"  # that fit into a page


def page() -> str:
    """A heading and the help of each command, in Markdown."""
    parts = []
    for words in commands():
        parts.append(f"## {' '.join(['fastjepa', *words])}\n\n```text\n{help_of(words)}```\n")
    return "\n".join(parts)


def commands() -> Iterator[tuple[str, ...]]:
    """Each command, and each action of those that have some."""
    yield ()
    for name, parser in _choices(cli._parser()).items():
        yield (name,)
        for action in _choices(parser):
            yield (name, action)


def help_of(words: tuple[str, ...]) -> str:
    """What `fastjepa WORDS --help` prints."""
    said = io.StringIO()
    with (
        patch.dict(os.environ, {"COLUMNS": _COLUMNS, "NO_COLOR": "1"}),
        contextlib.redirect_stdout(said),
        contextlib.suppress(SystemExit),
    ):
        cli.main([*words, "--help"])
    return said.getvalue()


def _choices(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            return dict(action.choices)
    return {}
