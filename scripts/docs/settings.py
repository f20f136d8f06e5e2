"""The table of every setting, from the dataclasses of fastjepa/config.py and the comments at their fields."""

import ast
import dataclasses
import inspect
import io
import json
import tokenize
import types
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from fastjepa import config as configuration
from fastjepa.config import Config

_WORDS = {int: "a whole number", float: "a number", str: "text", bool: "`true` or `false`"}


@dataclass(frozen=True)
class Setting:
    """One key of a configuration."""

    name: str
    allowed: str
    default: str
    meaning: str  # "" where nobody has said it


def settings_of(section: type) -> list[Setting]:
    """The settings of a section, in the order of its dataclass."""
    hints, meanings = typing.get_type_hints(section, include_extras=True), _meanings()[section.__name__]
    return [
        Setting(field.name, allowed(hints[field.name]), in_yaml(field.default), meanings[field.name])
        for field in dataclasses.fields(section)
    ]


def sections() -> Iterator[tuple[str, type]]:
    """Name and dataclass of each section."""
    for name, hint in typing.get_type_hints(Config).items():
        if dataclasses.is_dataclass(hint):
            yield name, typing.cast(type, hint)


def page() -> str:
    """A heading and a table for each section, in Markdown."""
    parts = []
    for name, section in sections():
        rows = [
            f"| {_key(name, s)} | {_cell(s.default)} | {_escaped(s.meaning)} | {s.allowed} |"
            for s in settings_of(section)
        ]
        table = "\n".join(["| setting | default | meaning | may be |", "|---|---|---|---|", *rows])
        parts.append(f"## {name}\n\n{table}\n")
    parts.append(f"## deepspeed\n\n{_meanings()['Config']['deepspeed'].capitalize()}.\n")
    return "\n".join(parts)


def in_yaml(value: Any) -> str:
    """A default as a configuration file has it."""
    if isinstance(value, tuple):
        return f"[{', '.join(map(in_yaml, value))}]"
    if isinstance(value, float):
        return f"{value:.6g}"
    return value if isinstance(value, str) else json.dumps(value)


def allowed(hint: Any) -> str:
    """What a value of this type may be, in words."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        return f"{_WORDS[arguments[0]]}, {arguments[1].words}"
    if origin in (types.UnionType, typing.Union):
        return ", or ".join(f"`{'null'}`" if a is type(None) else allowed(a) for a in arguments)
    if origin is Literal:
        return ", ".join(f"`{value}`" for value in arguments)
    if origin is tuple:
        each = allowed(arguments[0])
        if typing.get_origin(arguments[0]) is Literal:
            return f"a list of any of {each}"
        count = "one for each channel" if arguments[-1] is Ellipsis else f"{len(arguments)} of them"
        return f"a list, {count}: {each}"
    return _WORDS[hint]


def _key(section: str, setting: Setting) -> str:
    return f'<span id="{section}.{setting.name}"></span>`{section}.{setting.name}`'


def _cell(text: str) -> str:
    return f"`{text}`" if text else ""


def _escaped(text: str) -> str:
    return text.replace("|", "\\|")


def _meanings() -> dict[str, dict[str, str]]:
    """What the comments say of each field: the one behind it first, then those right above it."""
    source = inspect.getsource(configuration)
    comments = {
        token.start[0]: token.string.lstrip("# ")
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
        if token.type == tokenize.COMMENT
    }
    lines = source.splitlines()
    found: dict[str, dict[str, str]] = {}
    for node in ast.parse(source).body:
        if not isinstance(node, ast.ClassDef):
            continue
        for field in node.body:
            if not isinstance(field, ast.AnnAssign) or not isinstance(field.target, ast.Name):
                continue
            beside = [comments[n] for n in range(field.lineno, (field.end_lineno or 0) + 1) if n in comments]
            above: list[str] = []
            number = field.lineno - 1
            while lines[number - 1].lstrip().startswith("#"):
                above.insert(0, comments[number])
                number -= 1
            parts = [" ".join(beside).rstrip("."), " ".join(above).rstrip(".")]
            found.setdefault(node.name, {})[field.target.id] = ". ".join(part for part in parts if part)
    return found
