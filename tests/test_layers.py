"""The layers of fastjepa: an import never points up, and importing starts nothing."""

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import resolve_name
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# What each part of fastjepa may import besides itself. A part not listed here is refused.
LOWER_LAYERS = {
    "masks": {"fastjepa_kernels"},
    "models": {"fastjepa_kernels"},
    "data": {"masks"},
    "objectives": {"models", "masks", "fastjepa_kernels"},
    "evaluation": {"models", "data"},
    "passed_on": set[str](),
    "signals": set[str](),
    "config": {"passed_on"},
    "engine": {
        "objectives",
        "evaluation",
        "data",
        "models",
        "masks",
        "fastjepa_kernels",
        "config",
        "signals",
    },
    "planning": {"engine", "objectives", "data", "models", "masks", "config"},
}
COMMANDS = {"__main__", "train", "cli", "commands", "interop", "probe", "report", "diagnosis"}
MAY_IMPORT = LOWER_LAYERS | {command: COMMANDS | {*LOWER_LAYERS, "fastjepa_kernels"} for command in COMMANDS}
KERNELS_MAY_IMPORT = {"torch", "triton", "fastjepa_kernels", *sys.stdlib_module_names}
# Where one of these is wanted, a function imports it when it is called.
OPTIONAL_INSIDE_FUNCTIONS = {"flash_attn", "timm", "transformers"}


def imported_modules(source: str, package: str) -> Iterator[tuple[int, str]]:
    """Line and absolute dotted name of everything that a module of `package` imports, wherever in it.

    `from a import b` gives "a.b": whether b is a module or a name in one, its part of the code is the same.
    """
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Import(names=names):
                yield from ((node.lineno, alias.name) for alias in names)
            case ast.ImportFrom(module=module, names=names, level=level):
                base = resolve_name("." * level + (module or ""), package)
                yield from ((node.lineno, f"{base}.{alias.name}") for alias in names)
            case ast.Call(func=ast.Attribute(attr="import_module"), args=[ast.Constant(value=str(name)), *_]):
                yield node.lineno, name


def part_of_fastjepa(module: str) -> str | None:
    """The table's name of it: masks for fastjepa.masks.counter, fastjepa_kernels for itself, or None."""
    top, *rest = module.split(".")
    if top == "fastjepa_kernels":
        return top
    # fastjepa itself holds the version alone, which is everybody's to read.
    return rest[0] if top == "fastjepa" and rest and not rest[0].startswith("__") else None


def upward_imports(source_root: Path) -> list[str]:
    """One line for every import that the table does not allow, in fastjepa/ under `source_root`."""
    found = []
    for path in sorted(source_root.glob("fastjepa/**/*.py")):
        relative = path.relative_to(source_root)
        part = relative.parts[1].removesuffix(".py")
        allowed = {part} | MAY_IMPORT[part] if part in MAY_IMPORT else set()
        for line, module in imported_modules(path.read_text(encoding="utf-8"), ".".join(relative.parts[:-1])):
            imported = part_of_fastjepa(module)
            if imported is not None and imported not in allowed:
                found.append(f"{relative}:{line} imports {module}; {part} may import {sorted(allowed)}")
    return found


def lines_in_functions(source: str) -> set[int]:
    """Those that run when a function is called, not when the module is imported."""
    functions = (ast.FunctionDef, ast.AsyncFunctionDef)
    bodies = [node.body for node in ast.walk(ast.parse(source)) if isinstance(node, functions)]
    return {line for body in bodies for line in range(body[0].lineno, (body[-1].end_lineno or 0) + 1)}


def foreign_imports_of_kernels(source_root: Path) -> list[str]:
    """One line for every import in fastjepa_kernels besides torch, Triton and the standard library.

    A function may import what is optional.
    """
    found = []
    for path in sorted(source_root.glob("fastjepa_kernels/**/*.py")):
        relative, source = path.relative_to(source_root), path.read_text(encoding="utf-8")
        when_called = lines_in_functions(source)
        for line, module in imported_modules(source, ".".join(relative.parts[:-1])):
            top = module.split(".")[0]
            optional = top in OPTIONAL_INSIDE_FUNCTIONS and line in when_called
            if top not in KERNELS_MAY_IMPORT and not optional:
                found.append(f"{relative}:{line} imports {module}")
    return found


def test_no_import_points_up() -> None:
    found = upward_imports(ROOT)
    assert not found, "\n".join(found)


def test_kernels_need_torch_alone() -> None:
    found = foreign_imports_of_kernels(ROOT / "kernels")
    assert not found, "\n".join(found)


def test_every_part_has_its_row() -> None:
    names = {path.stem for path in (ROOT / "fastjepa").iterdir() if path.is_dir() or path.suffix == ".py"}
    assert names - {"__init__", "__pycache__"} <= MAY_IMPORT.keys()


def test_every_folder_with_code_is_a_package() -> None:
    # The build takes packages only, so a folder without __init__.py would be missing from an install.
    files = [*(ROOT / "fastjepa").rglob("*.py"), *(ROOT / "kernels").rglob("*.py")]
    assert {str(path.parent) for path in files if not (path.parent / "__init__.py").exists()} == set()


@pytest.mark.parametrize(
    ("file", "line", "caught"),
    [
        ("masks/multiblock.py", "from fastjepa.engine import loop", True),
        ("masks/multiblock.py", "from ..engine.loop import run", True),
        ("masks/multiblock.py", "from .. import engine", True),
        ("masks/multiblock.py", "from .counter import uniform", False),
        ("masks/multiblock.py", "from fastjepa import __version__", False),
        ("masks/deeper/blocks.py", "from ...data import loader", True),
        ("masks/deeper/blocks.py", "from ..counter import uniform", False),
        ("models/encoder.py", "def f():\n    import fastjepa.config", True),
        ("models/encoder.py", "import importlib\nimportlib.import_module('fastjepa.train')", True),
        ("models/encoder.py", "import fastjepa_kernels as fk", False),
        ("data/loader.py", "import fastjepa_kernels as fk", True),
        ("engine/loop.py", "from fastjepa.config import Config", False),
        ("engine/loop.py", "from fastjepa.report import page", True),
        ("cli.py", "from fastjepa.report import page", False),
        ("newcomer.py", "from fastjepa.masks import MultiBlockMasks", True),
    ],
)
def test_an_import_that_points_up_is_found(tmp_path: Path, file: str, line: str, caught: bool) -> None:
    path = tmp_path / "fastjepa" / file
    path.parent.mkdir(parents=True)
    path.write_text(line)
    assert bool(upward_imports(tmp_path)) == caught


@pytest.mark.parametrize(
    ("line", "caught"),
    [
        ("import fastjepa", True),
        ("from fastjepa.masks import RandomMasks", True),
        ("import numpy as np", True),
        ("def f():\n    import numpy", True),
        ("import flash_attn", True),
        ("class C:\n    import timm", True),
        ("def f():\n    from flash_attn.cute import interface", False),
        ("def f(x):\n    if x:\n        import timm\nimport math", False),
    ],
)
def test_a_foreign_import_of_kernels_is_found(tmp_path: Path, line: str, caught: bool) -> None:
    path = tmp_path / "fastjepa_kernels" / "gather.py"
    path.parent.mkdir()
    path.write_text(f"import torch\nfrom .sequences import lengths\n{line}\n")
    assert len(foreign_imports_of_kernels(tmp_path)) == caught


IMPORT_AND_LOOK = """
import sys
import torch

started = []
sys.addaudithook(lambda event, args: started.append(args) if event == "subprocess.Popen" else None)

import fastjepa, fastjepa_kernels, fastjepa.models

assert "deepspeed" not in sys.modules, "importing loads DeepSpeed"
assert not torch.cuda.is_initialized(), "importing starts CUDA"
assert not started, f"importing starts processes: {started}"
"""


def test_importing_compiles_nothing_and_starts_nothing(tmp_path: Path) -> None:
    cache = tmp_path / "triton"
    done = subprocess.run(
        [sys.executable, "-c", IMPORT_AND_LOOK],
        env=os.environ | {"TRITON_CACHE_DIR": str(cache)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert not cache.exists(), "importing compiles Triton kernels"
