"""The Makefile, on a project as small as pip takes: set up once, resumed, explained, and no work deleted."""

import os
import subprocess
import sys
from pathlib import Path
from shutil import copyfile, which

import pytest

ROOT = Path(__file__).resolve().parents[1]

pytestmark = pytest.mark.skipif(which("make") is None, reason="needs make")

# A build backend with nothing to download, so that the real pip installs a real, empty project.
BACKEND = """
import zipfile

def build_editable(directory, config_settings=None, metadata_directory=None):
    name = "tiny-0-py3-none-any.whl"
    metadata = "Metadata-Version: 2.1\\nName: tiny\\nVersion: 0\\n"
    metadata += "".join(f"Provides-Extra: {extra}\\n" for extra in ("train", "bench", "dev"))
    with zipfile.ZipFile(f"{directory}/{name}", "w") as wheel:
        wheel.writestr("tiny-0.dist-info/METADATA", metadata)
        wheel.writestr("tiny-0.dist-info/WHEEL", "Wheel-Version: 1.0\\nTag: py3-none-any\\n")
        wheel.writestr("tiny-0.dist-info/RECORD", "")
    return name
"""


@pytest.fixture
def project(tmp_path: Path) -> Path:
    copyfile(ROOT / "Makefile", tmp_path / "Makefile")
    (tmp_path / "setup.py").touch()
    (tmp_path / "constraints.txt").touch()
    (tmp_path / "pyproject.toml").write_text(
        '[build-system]\nrequires = []\nbuild-backend = "backend"\nbackend-path = ["."]\n'
    )
    (tmp_path / "backend.py").write_text(BACKEND)
    return tmp_path


def make(project: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    # Not this process's environment: under `make test` it holds the outer make's flags and variables.
    env = {"PATH": os.environ["PATH"], "HOME": str(project), "PIP_CONFIG_FILE": os.devnull, **variables}
    command = ["make", f"PYTHON={sys.executable}", *arguments]
    return subprocess.run(command, cwd=project, env=env, capture_output=True, text=True)


def test_help_is_the_default_and_lists_what_there_is(project: Path) -> None:
    listed = make(project).stdout
    assert listed == make(project, "help").stdout
    for target in ("setup", "train", "test", "bench", "aot", "ext", "ext-cuda", "lint", "docs", "clean"):
        assert f"make {target} " in listed


def test_train_hands_its_arguments_on(project: Path) -> None:
    (project / ".venv").mkdir()
    (project / ".venv" / ".train.stamp").touch()
    said = make(project, "-n", "train", "ARGS=optim.epochs=1 optim.lr=0.1").stdout
    command = ".venv/bin/python fastjepa/train.py --config configs/fashion_mnist.yaml"
    assert said == f"{command} optim.epochs=1 optim.lr=0.1\n"


@pytest.fixture
def set_up(project: Path) -> Path:
    """With stamps that say that .venv is made, and a Python in it that does nothing, and says so."""
    (project / ".venv" / "bin").mkdir(parents=True)
    python = project / ".venv" / "bin" / "python"
    python.write_text('#!/bin/sh\necho "python $*"\n')
    python.chmod(0o755)
    for stamp in (".train.stamp", ".dev.stamp"):
        (project / ".venv" / stamp).touch()
    return project


def test_the_extension_is_built_for_the_tests_where_it_can_be(set_up: Path) -> None:
    without = make(set_up, "test", CXX="/nowhere/c++")
    assert without.returncode == 0, without.stderr
    assert "the ops are tested without fastjepa_kernels._C" in without.stdout
    assert "build_ext" not in without.stdout
    built = make(set_up, "test", CXX="true")
    assert built.stdout.index("Building fastjepa_kernels._C") < built.stdout.index("-m pytest")
    log = set_up / "build" / "ext.log"
    assert log.read_text() == "python setup.py build_ext --inplace --force\n"
    # Once, until a source changes.
    assert "Building" not in make(set_up, "test", CXX="true").stdout
    (set_up / "csrc").mkdir()
    (set_up / "csrc" / "new.cpp").touch()
    later = (set_up / "build" / ".ext.stamp").stat().st_mtime + 1
    os.utime(set_up / "csrc" / "new.cpp", (later, later))
    assert "Building" in make(set_up, "test", CXX="true").stdout


def test_without_nvcc_it_says_so(project: Path) -> None:
    failed = make(project, "ext-cuda", "NVCC=/nowhere/nvcc")
    assert failed.returncode != 0
    assert "make ext-cuda needs nvcc" in failed.stderr


def test_setup_fails_aloud_resumes_and_happens_once(project: Path) -> None:
    stamps = [project / ".venv" / name for name in (".dev.stamp", ".train.stamp")]
    (project / "backend.py").write_text("raise SystemExit('the download broke off')")
    failed = make(project, "setup")
    assert failed.returncode != 0
    assert "Setting up .venv" in failed.stdout
    assert "the download broke off" in failed.stdout + failed.stderr
    assert not any(stamp.exists() for stamp in stamps)

    (project / "backend.py").write_text(BACKEND)
    resumed = make(project, "setup")
    assert resumed.returncode == 0, resumed.stdout + resumed.stderr
    assert all(stamp.exists() for stamp in stamps)
    assert list(project.glob(".venv/lib/*/site-packages/tiny-0.dist-info"))

    assert make(project, "setup").stdout == "make: Nothing to be done for 'setup'.\n"
    assert make(project, "-q", ".venv/.train.stamp").returncode == 0
    later = stamps[0].stat().st_mtime + 1
    os.utime(project / "constraints.txt", (later, later))
    assert make(project, "-q", ".venv/.train.stamp").returncode == 1


@pytest.mark.parametrize(
    ("module", "content", "answer"),
    [
        ("ensurepip.py", "raise ImportError", "install its venv module"),
        ("sitecustomize.py", "import sys; sys.version_info = (3, 10, 18)", "needs Python 3.11 or newer"),
    ],
)
def test_setup_says_what_the_python_lacks(project: Path, module: str, content: str, answer: str) -> None:
    (project / "lacking").mkdir()
    (project / "lacking" / module).write_text(content)
    failed = make(project, "setup", PYTHONPATH=str(project / "lacking"))
    assert failed.returncode != 0
    assert answer in failed.stderr
    assert not (project / ".venv").exists()


def test_bench_without_benchmarks_says_so_and_sets_up_nothing(project: Path) -> None:
    (project / "bench").mkdir()
    done = make(project, "bench")
    assert done.returncode == 0
    assert "nothing was measured" in done.stdout
    assert not (project / ".venv").exists()


def test_clean_removes_what_was_built_and_keeps_work(project: Path) -> None:
    built = ["build/lib/x.py", "dist/x.whl", "site/index.html", "fastjepa.egg-info/PKG-INFO", ".mypy_cache/x"]
    built += [
        "fastjepa/masks/__pycache__/x.pyc",
        "kernels/fastjepa_kernels/_C.cpython-311-x86_64-linux-gnu.so",
    ]
    kept = ["runs/first/metrics.jsonl", ".venv/lib/__pycache__/x.pyc", "fastjepa/masks/counter.py"]
    for name in built + kept:
        (project / name).parent.mkdir(parents=True, exist_ok=True)
        (project / name).touch()
    assert make(project, "clean").returncode == 0
    assert [name for name in built if (project / name).exists()] == []
    assert [name for name in kept if not (project / name).exists()] == []
