"""What is built from a checkout, and what works where only that and torch are installed."""

import os
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterable, Sequence
from email import message_from_bytes
from email.message import Message
from importlib.metadata import Distribution, distribution
from pathlib import Path, PurePosixPath
from shutil import copyfile, which

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]

# All that an install without extras may ask for.
BASE = {"torch", "numpy", "safetensors"}

# Left behind by runs, builds and Python itself in a checkout that is worked in; none of it may be shipped.
LITTER = [
    "runs/first/metrics.jsonl",
    "build/lib/fastjepa/deleted_last_week.py",
    "fastjepa/masks/__pycache__/counter.cpython-311.pyc",
    "kernels/fastjepa_kernels/_C.cpython-311-x86_64-linux-gnu.so",
]


def run(command: Sequence[str | Path], *, cwd: Path, env: dict[str, str] | None = None) -> str:
    done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def build_environment(**variables: str) -> dict[str, str]:
    """This process's environment without what would change a build."""
    dropped = ("PIP_", "PYTHONPATH", "FASTJEPA_", "SOURCE_DATE_EPOCH")
    return {key: value for key, value in os.environ.items() if not key.startswith(dropped)} | variables


@pytest.fixture(scope="module")
def checkout() -> list[str]:
    """The files git tracks or would track: what a fresh clone of this working tree holds."""
    if not (ROOT / ".git").exists():
        pytest.skip("needs a git checkout to know which files belong to it")
    # The owner of the checkout may be another user, as in a container; git reads nothing but names here.
    command = ["git", "-c", "safe.directory=*", "ls-files", "-co", "--exclude-standard", "-z"]
    names = run(command, cwd=ROOT).split("\0")
    return sorted({name for name in names if name and (ROOT / name).is_file()})


@pytest.fixture(scope="module")
def copy(checkout: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("copy")
    for name in [*checkout, *LITTER]:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        if name in checkout:
            copyfile(ROOT / name, folder / name)
        else:
            (folder / name).write_bytes(b"")
    return folder


@pytest.fixture(scope="module")
def built(copy: Path) -> Path:
    """The folder with the sdist, and the wheel that was built from it."""
    run([sys.executable, "-m", "build", "--no-isolation"], cwd=copy, env=build_environment())
    return copy / "dist"


@pytest.fixture(scope="module")
def wheel(built: Path) -> Path:
    return next(built.glob("*.whl"))


@pytest.fixture(scope="module")
def metadata(wheel: Path) -> Message:
    with zipfile.ZipFile(wheel) as archive:
        name = next(name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        return message_from_bytes(archive.read(name))


def test_sdist_holds_the_checkout(built: Path, checkout: list[str]) -> None:
    with tarfile.open(next(built.glob("*.tar.gz"))) as archive:
        shipped = {str(PurePosixPath(*PurePosixPath(name).parts[1:])) for name in archive.getnames()}
    parts = ("bench/", "configs/", "csrc/", "docs/", "fastjepa/", "kernels/", "tests/")
    expected = {name for name in checkout if name.startswith(parts)}
    expected |= {
        "setup.py",
        "pyproject.toml",
        "constraints.txt",
        "Makefile",
        "README.md",
        "LICENSE",
        "CITATION.cff",
    }
    assert expected - shipped == set()
    assert shipped.isdisjoint(LITTER)


def test_wheel_holds_the_two_packages_and_nothing_else(wheel: Path, checkout: list[str]) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    shipped = {name for name in names if ".dist-info/" not in name}
    in_checkout = {
        name.removeprefix("kernels/")
        for name in checkout
        if name.startswith(("fastjepa/", "kernels/fastjepa_kernels/"))
    }
    assert shipped == in_checkout
    assert {"fastjepa/py.typed", "fastjepa_kernels/py.typed"} <= shipped
    assert wheel.name.endswith("-py3-none-any.whl")
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in names)


def test_metadata(metadata: Message) -> None:
    assert metadata["Name"] == "fastjepa"
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Requires-Python"] == ">=3.11"
    requirements = [Requirement(line) for line in metadata.get_all("Requires-Dist", [])]
    base = {requirement.name for requirement in requirements if requirement.marker is None}
    assert base == BASE
    assert set(metadata.get_all("Provides-Extra", [])) == {
        "train",
        "data",
        "tracking",
        "bench",
        "export",
        "docs",
        "dev",
    }


def test_constraints_pin_every_direct_dependency(metadata: Message) -> None:
    pins = [
        Requirement(line)
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if line[:1].isalpha()
    ]
    direct = {canonicalize_name(Requirement(line).name) for line in metadata.get_all("Requires-Dist", [])}
    assert direct - {canonicalize_name(pin.name) for pin in pins} == set()
    assert [str(pin) for pin in pins if not str(pin.specifier).startswith("==")] == []


def installed_with_dependencies(names: Iterable[str]) -> list[Distribution]:
    """The installed distributions of these names, and of everything they ask for."""
    found: dict[tuple[str, str], Distribution] = {}
    wanted = [Requirement(name) for name in names]
    while wanted:
        requirement = wanted.pop()
        for extra in ("", *requirement.extras):
            key = (canonicalize_name(requirement.name), extra)
            if key in found:
                continue
            found[key] = distribution(requirement.name)
            lines = map(Requirement, found[key].requires or [])
            wanted += [
                line for line in lines if line.marker is None or line.marker.evaluate({"extra": extra})
            ]
    return list(found.values())


def link_into(site_packages: Path, distributions: Iterable[Distribution]) -> None:
    """Make the distributions look installed there, by links to their top-level files and folders."""
    for each in distributions:
        assert each.files, f"{each.name} does not say which files it installed"
        for top in {file.parts[0] for file in each.files} - {"..", "__pycache__"}:
            link = site_packages / top
            if not link.is_symlink():
                link.symlink_to(str(each.locate_file(top)))


@pytest.fixture(scope="module")
def bare_install(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bin folder of an environment with the wheel and its dependencies: no compiler, no extras."""
    folder = tmp_path_factory.mktemp("bare")
    run([sys.executable, "-m", "venv", "--without-pip", folder], cwd=folder)
    python = str(folder / "bin" / "python")
    site_packages = run([python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], cwd=folder)
    link_into(Path(site_packages.strip()), installed_with_dependencies(BASE))
    # Dependencies are resolved and no index is asked: one that is not linked above fails here.
    pip = [sys.executable, "-m", "pip", "--python", python]
    run([*pip, "install", "--quiet", "--no-index", wheel], cwd=folder, env=bare_environment(folder))
    return folder / "bin"


def bare_environment(folder: Path) -> dict[str, str]:
    path = str(folder / "bin")
    assert not any(which(tool, path=path) for tool in ("gcc", "cc", "c++", "nvcc", "ninja"))
    return {"PATH": path, "HOME": str(folder), "PIP_CONFIG_FILE": os.devnull}


USE_IT = """
import sys

import torch

import fastjepa
import fastjepa.models
import fastjepa_kernels as fk
from fastjepa.data.fashion_mnist import FashionMNIST
from fastjepa.masks import MultiBlockMasks

assert "deepspeed" not in sys.modules
assert not torch.cuda.is_initialized()

assert len(FashionMNIST(split="test")) == 10_000
masks = MultiBlockMasks(grid=(14, 14)).sample(torch.arange(4))
tokens = fk.gather_tokens(torch.randn(4, 196, 8), masks.context)
assert tokens.shape == (*masks.context.shape, 8)
print(fastjepa.__version__, fastjepa.__file__, fk.__file__)
"""


def test_wheel_works_without_compiler_and_extras(bare_install: Path, metadata: Message) -> None:
    folder = bare_install.parent
    said = run([bare_install / "python", "-c", USE_IT], cwd=folder, env=bare_environment(folder))
    version, *files = said.split()
    assert version == metadata["Version"]
    assert all(Path(file).is_relative_to(folder) for file in files)


def test_command_is_installed(bare_install: Path) -> None:
    said = run(
        [bare_install / "fastjepa", "--help"], cwd=bare_install, env=bare_environment(bare_install.parent)
    )
    assert "fastjepa" in said


@pytest.fixture
def nothing_to_compile(copy: Path, tmp_path: Path) -> Path:
    """As much of the checkout as setup.py reads, with an empty csrc/: what is there takes a minute."""
    for name in ("setup.py", "README.md", "LICENSE", "fastjepa/__init__.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        copyfile(copy / name, tmp_path / name)
    (tmp_path / "csrc").mkdir()
    package = tmp_path / "kernels" / "fastjepa_kernels"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    return tmp_path


@pytest.mark.parametrize(
    ("variables", "answer"),
    [
        ({"FASTJEPA_BUILD_EXT": "yes"}, "1 builds the extension"),
        ({"FASTJEPA_BUILD_EXT": "1", "PATH": "/nowhere"}, "built with ninja, which is not on PATH"),
    ],
)
def test_an_extension_that_cannot_be_built_ends_the_build(
    nothing_to_compile: Path, variables: dict[str, str], answer: str
) -> None:
    done = subprocess.run(
        [sys.executable, "setup.py", "build_ext"],
        cwd=nothing_to_compile,
        env=build_environment(**variables),
        capture_output=True,
        text=True,
    )
    assert done.returncode != 0
    assert answer in done.stderr


MODULE = """
#include <Python.h>
static PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr};
PyMODINIT_FUNC PyInit__C() { return PyModule_Create(&definition); }
"""


@pytest.mark.skipif(not (which("c++") and which("ninja")), reason="needs a C++ compiler and ninja")
def test_sources_in_csrc_become_the_extension(nothing_to_compile: Path) -> None:
    (nothing_to_compile / "csrc" / "module.cpp").write_text(MODULE)
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    run(command, cwd=nothing_to_compile, env=build_environment(FASTJEPA_BUILD_EXT="1"))
    look = [
        sys.executable,
        "-c",
        "import torch, fastjepa_kernels._C as C; print(C.__file__)",
    ]
    said = run(look, cwd=nothing_to_compile / "kernels", env=build_environment())
    assert Path(said.strip()).parent == nothing_to_compile / "kernels" / "fastjepa_kernels"
