"""One distribution, `fastjepa`, with two import packages: `fastjepa` and `fastjepa_kernels`.

Everything in it is Python, so building and installing it needs no compiler. FASTJEPA_BUILD_EXT=1
adds the optional extension fastjepa_kernels._C, built with ninja from the sources in csrc/.
"""

import os
import re
import sys
from pathlib import Path
from typing import Any, NoReturn

from setuptools import find_packages, setup

ROOT = Path(__file__).resolve().parent

TRAIN = ["deepspeed>=0.19.8", "ninja", "pyyaml", "pillow", "rich", "matplotlib"]
BENCH = ["pytest>=8", "pytest-benchmark"]
DOCS = ["mkdocs>=1.6,<2", "mkdocs-material>=9.5"]
DEV = [
    "build",
    "hypothesis",
    "mypy",
    "packaging",
    "pytest>=8",
    "pytest-xdist",
    "ruff",
    "scikit-learn",
    "setuptools>=77.0.3",
    "timm>=1.0",
    "torchvision",
    "transformers>=5",
    "types-PyYAML",
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


def native_extension() -> dict[str, Any]:
    """The arguments of setup() that compile csrc/ into fastjepa_kernels._C; none unless FASTJEPA_BUILD_EXT=1.

    C++ sources are always built, CUDA sources where nvcc is found, with FASTJEPA_WITH_CUDA defined.
    """
    asked = os.environ.get("FASTJEPA_BUILD_EXT", "")
    if asked in ("", "0"):
        return {}
    if asked != "1":
        refuse("1 builds the extension fastjepa_kernels._C; 0, or leaving it unset, does not.")

    # setuptools wants paths relative to this file.
    cpp = sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("csrc/**/*.cpp"))
    cuda = sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("csrc/**/*.cu"))
    if not cpp and not cuda:
        refuse("csrc/ holds no *.cpp or *.cu to build. Unset it: every op works without the extension.")
    try:
        from torch.utils import cpp_extension
    except ImportError as error:
        refuse(
            f"the extension compiles against torch, and here: {error}. Install torch and ninja, then "
            "build in that environment: pip install --no-build-isolation ."
        )
    if not cpp_extension.is_ninja_available():
        refuse("the extension is built with ninja, which is not on PATH. Run: pip install ninja")

    has_nvcc = cpp_extension.CUDA_HOME is not None and Path(cpp_extension.CUDA_HOME, "bin", "nvcc").exists()
    if cuda and not has_nvcc:
        if not cpp:
            refuse("csrc/ holds CUDA sources alone, and no nvcc was found. Set CUDA_HOME.")
        print(f"No nvcc found, so left out of fastjepa_kernels._C: {', '.join(cuda)}", file=sys.stderr)

    options: dict[str, Any] = {"name": "fastjepa_kernels._C", "include_dirs": [str(ROOT / "csrc")]}
    if cuda and has_nvcc:
        macros = [("FASTJEPA_WITH_CUDA", "1")]
        extension = cpp_extension.CUDAExtension(sources=cpp + cuda, define_macros=macros, **options)
    else:
        extension = cpp_extension.CppExtension(sources=cpp, **options)
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
    extras_require={"train": TRAIN, "bench": BENCH, "docs": DOCS, "dev": DEV},
    packages=[*find_packages(include=["fastjepa", "fastjepa.*"]), *find_packages("kernels")],
    package_dir={"fastjepa_kernels": "kernels/fastjepa_kernels"},
    package_data={
        "fastjepa": ["py.typed"],
        "fastjepa.data.fashion_mnist": ["*"],
        "fastjepa.report": ["*.html", "*.css"],
        "fastjepa_kernels": ["py.typed"],
    },
    entry_points={"console_scripts": ["fastjepa = fastjepa.cli:main"]},
    **native_extension(),
)
